"""LoRA and the gated MLP with fewer saved activations and the same results; norms that take another kernel.

Autograd keeps what every single operation was given. Written as one function each, these two keep only what their own
gradients need: LoRA neither a dropped-out nor a float32 copy of its input, the gated MLP no ``silu(gate)``. Modules
keep their parameters and names; whatever is not the plain case runs the library's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _AddLowRank(torch.autograd.Function):
    """base + scaling * dropped(x) A^T B^T (Hu et al. 2021); of the dropout only a mask of one byte is kept."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor:
        """base [..., O], x [..., I], a [r, I], b [O, r] -> [..., O] in the dtype of ``base``."""
        rows = x.reshape(-1, x.shape[-1]).to(base.dtype)  # [T, I]
        kept = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        low = _drop(rows, kept, dropout) @ a.to(rows.dtype).t()  # [T, r]
        ctx.save_for_backward(rows, low, a, b, kept)
        ctx.scaling, ctx.dropout = scaling, dropout
        flat = base.reshape(-1, base.shape[-1])
        return torch.addmm(flat, low, b.to(rows.dtype).t(), alpha=scaling).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of base, x, a and b."""
        rows, low, a, b, kept = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, b.shape[0])  # [T, O]
        grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)  # [T, r]
        grad_a = grad_low.t() @ _drop(rows, kept, ctx.dropout)
        grad_b = (grad.t() @ low).mul_(ctx.scaling)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = _drop(grad_low @ a.to(grad.dtype), kept, ctx.dropout)
            grad_x = grad_x.view(*grad_outputs[0].shape[:-1], -1)
        return grad_outputs[0], grad_x, grad_a, grad_b, None, None


def _drop(rows: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    return rows if kept is None else (rows * kept).mul_(1 / (1 - dropout))


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


class _LeanLora:
    """Goes before a LoRA layer of peft among the bases of a class."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or self.lora_variant or args or kwargs or len(names) != 1:
            plain: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return plain
        a, b, dropout = self.lora_A[names[0]], self.lora_B[names[0]], self.lora_dropout[names[0]]
        if b.bias is not None:
            biased: Tensor = super().forward(x)  # type: ignore[misc]
            return biased
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        adapted: Tensor = _AddLowRank.apply(self.base_layer(x), x, a.weight, b.weight, self.scaling[names[0]], rate)
        return adapted


class LeanMLP:
    """Goes before an MLP whose forward is Llama's among the bases of a class.

    kernel: SwiGLU of (gate, up) while gradients are recorded; None = the one above.
    """

    kernel: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        swiglu = self.kernel if self.kernel is not None and torch.is_grad_enabled() else _SwiGLU.apply
        result: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return result


class LeanNorm:
    """Goes before a norm whose forward is Llama's among the bases of a class; computes what that computes.

    kernel: RMSNorm of (x, weight, epsilon) while gradients are recorded; None = the library's forward.
    """

    kernel: Callable[[Tensor, Tensor, float], Tensor] | None = None

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if self.kernel is None or not torch.is_grad_enabled():
            plain: Tensor = super().forward(x)  # type: ignore[misc]
            return plain
        normed: Tensor = self.kernel(x, self.weight, self.variance_epsilon)
        return normed


def use_lean_layers(llm: nn.Module) -> None:
    """Give the LoRA layers and the gated MLPs of ``llm`` a forward that saves less, its norms one that can be given a
    kernel (``fused.fuse``); leave every other layer alone."""
    from peft.tuners.lora import LoraLayer
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module: Any
    for module in llm.modules():
        if isinstance(module, LoraLayer) and isinstance(module.base_layer, nn.Linear):
            module.__class__ = put_before(_LeanLora, type(module))
        elif _is_gated_mlp(module):
            module.__class__ = put_before(LeanMLP, type(module))
        elif runs_code_of(type(module).forward, LlamaRMSNorm.forward):
            module.__class__ = put_before(LeanNorm, type(module))


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether the class runs the very code of Llama's MLP (Mistral's and Qwen's do), with SiLU."""
    from transformers.activations import SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP

    return runs_code_of(type(module).forward, LlamaMLP.forward) and isinstance(module.act_fn, nn.SiLU | SiLUActivation)


def runs_code_of(own: Any, other: Any) -> bool:
    """Whether two functions, decorators aside, are the same code under two names: families copy layers of Llama."""
    one, two = (getattr(inspect.unwrap(function), "__code__", None) for function in (own, other))
    return one is not None and two is not None and (one.co_code, one.co_names) == (two.co_code, two.co_names)


def put_before(mixin: type, kind: Any) -> Any:
    """The class ``kind`` under its own name, with ``mixin`` before it among its bases; the same one every time."""
    return _combined(mixin, kind)


@cache
def _combined(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
