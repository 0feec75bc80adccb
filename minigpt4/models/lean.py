"""The gated MLP with fewer saved activations and the same results.

Autograd keeps what every single operation was given. Written as one function, ``silu(gate) * up`` keeps only what its
own gradient needs. Modules keep their parameters and names; every other layer runs the library's own forward.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020); ``silu(gate)`` is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up [..., F] -> [..., F]."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        grad_up = functional.silu(gate).mul_(grad_outputs[0])
        return torch.ops.aten.silu_backward(grad_outputs[0] * up, gate), grad_up


class _LeanMLP:
    """Goes before an MLP whose forward is Llama's among the bases of a class."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def use_lean_layers(llm: nn.Module) -> None:
    """Give the gated MLPs of ``llm`` a forward that saves less; leave every other layer alone."""
    for module in llm.modules():
        if _is_gated_mlp(module):
            module.__class__ = _with(_LeanMLP, type(module))


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether the class runs the very code of Llama's MLP (Mistral's and Qwen's do), with SiLU."""
    from transformers.activations import SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP

    own, llama = getattr(type(module).forward, "__code__", None), LlamaMLP.forward.__code__
    if own is None or (own.co_code, own.co_names) != (llama.co_code, llama.co_names):
        return False
    return isinstance(module.act_fn, nn.SiLU | SiLUActivation)


@cache
def _with(mixin: type, kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (mixin, kind), {})
