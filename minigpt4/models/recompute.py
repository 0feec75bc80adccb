"""Recomputing the MLP of every layer in the backward: most of what a layer keeps, for a part of its arithmetic.

Chen et al. 2016, at the one place where a transformer keeps its widest tensors. Parameters and names stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt4.common.errors import ConfigError
from minigpt4.models.last_layer import is_llama_layer
from minigpt4.models.lean import put_before


def recompute_mlps(llm: Any) -> None:
    """``llm``: a causal LM of transformers. Its MLPs, and where the layer is Llama's the norms before them, keep their
    input alone while gradients are recorded. Raises ConfigError when its layers have no ``mlp``.
    """
    layers = [module for module in llm.get_decoder().modules() if isinstance(getattr(module, "mlp", None), nn.Module)]
    if not layers:
        raise ConfigError(f"run.recompute mlp: no layer of {type(llm).__name__} has an mlp; use full")
    for layer in layers:
        mlp: Any = layer.mlp
        mlp.norms = ()
        if is_llama_layer(layer):
            norm: Any = layer.post_attention_layernorm
            norm.__class__ = put_before(_PassesOn, type(norm))
            mlp.norms = (norm,)  # in a tuple: no second name for its weight
        mlp.__class__ = put_before(_Recomputed, type(mlp))


class _PassesOn:
    """Goes before a norm among the bases of a class: the MLP behind it normalises."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], as it came."""
        return x

    def normalise(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        normed: Tensor = super().forward(x)  # type: ignore[misc]
        return normed


class _Recomputed:
    """Goes before an MLP among the bases of a class."""

    norms: tuple[_PassesOn, ...]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D], not normalised yet if ``norms`` has a norm -> [..., D]."""
        if not torch.is_grad_enabled():
            return self.compute(x)
        result: Tensor = checkpoint(self.compute, x, use_reentrant=False)
        return result

    def compute(self, x: Tensor) -> Tensor:
        """What is computed twice."""
        for norm in self.norms:
            x = norm.normalise(x)
        result: Tensor = super().forward(x)  # type: ignore[misc]
        return result
