"""The last decoder layer, computed at the positions whose output somebody reads.

Only supervised positions reach the head, about every second or third one. All positions are still keys and values of
the last layer's attention; its output projection and its MLP, three quarters of its weights, see the wanted ones alone.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from minigpt4.models.lean import put_before, runs_code_of


def narrow_last_layer(llm: Any) -> bool:
    """Give the last layer of ``llm``, a causal LM of transformers, the keyword ``wanted``, which its decoder hands on.

    False where the layer is not Llama's. Parameters and names stay as they are.
    """
    layers = getattr(llm.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not is_llama_layer(layers[-1]):
        return False
    last: Any = layers[-1]
    if not isinstance(last, _Narrow):
        last.__class__ = put_before(_Narrow, type(last))
    return True


def is_llama_layer(layer: nn.Module) -> bool:
    """Whether the layer runs the very code of Llama's (Mistral's and Qwen's do)."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return isinstance(layer, _Narrow) or runs_code_of(type(layer).forward, LlamaDecoderLayer.forward)


class _Narrow:
    """Goes before a decoder layer with Llama's forward among the bases of a class."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, wanted: Tensor | None = None, **kwargs: Any) -> Any:
        """hidden_states [R, T, D] -> [R, T, D]; with ``wanted`` [n], numbers of positions in R * T, [1, n, D]."""
        if wanted is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        last_step = self.self_attn.o_proj  # what comes before it needs every position
        if not isinstance(last_step, _Picks):  # here, as adapters that are merged leave another module
            last_step.__class__ = put_before(_Picks, type(last_step))
        token = _WANTED.set(wanted)
        try:
            attended, _ = self.self_attn(*args, hidden_states=self.input_layernorm(hidden_states), **kwargs)
        finally:
            _WANTED.reset(token)
        middle = _pick(hidden_states, wanted) + attended
        return middle + self.mlp(self.post_attention_layernorm(middle))


_WANTED: ContextVar[Tensor | None] = ContextVar("wanted", default=None)
"""What the narrow layer that this thread is in was asked for; other threads may be in the same layer."""


class _Picks:
    """Goes before a linear layer among the bases of a class."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [R, T, I] -> [R, T, O], or of wanted positions alone [1, n, O]."""
        wanted = _WANTED.get()
        return super().forward(x if wanted is None else _pick(x, wanted), *args, **kwargs)  # type: ignore[misc]


def _pick(rows: Tensor, wanted: Tensor) -> Tensor:
    return rows.flatten(0, 1)[wanted][None]
