"""A training step on the meta device that allocates what the same step allocates on a GPU.

Shapes alone do not know which dtype a GPU computes in, nor which kernels it has. Two things supply that: ``GpuCalls``
for calls of Python functions (autocast, fused attention, fused dropout), ``MetaOperations`` for single operations
(mixed devices, sizes that depend on values).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from minigpt4.tools.live_memory import storage_key, tensors_in

_META, _CPU = torch.device("meta"), torch.device("cpu")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Autocast's rules for CUDA, as PyTorch documents them ("Autocast Op Reference"), under the names Python code calls.
_HALF = frozenset(
    "linear matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv addr addbmm baddbmm chain_matmul multi_dot einsum "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d prelu scaled_dot_product_attention".split()
)
_FLOAT = frozenset(
    "acos asin cosh sinh tan erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt pow __pow__ __rpow__ softplus "
    "layer_norm group_norm norm renorm dist cdist pdist logsumexp cosine_similarity cosine_embedding_loss "
    "cross_entropy nll_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss hinge_embedding_loss "
    "binary_cross_entropy_with_logits poisson_nll_loss margin_ranking_loss triplet_margin_loss".split()
)
_FLOAT_RESULT = frozenset("softmax log_softmax sum prod cumsum cumprod".split())


class GpuCalls(TorchFunctionMode):
    """Autocast, attention and dropout as on CUDA; with ``fused`` False, attention and dropout as on a CPU.

    To all but torch itself, meta tensors say that they are on the CPU: libraries ask for a tensor's device before they
    touch autocast, and only the CPU's autocast can be switched on everywhere. Its flag is the switch; the casts are
    made here.
    """

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self._keeps_casts = True
        self._casts: dict[int, Tensor] = {}

    def end_forward(self) -> None:
        """Autocast drops its 16-bit copies of trained weights where the forward ends; recomputation makes new ones."""
        self._keeps_casts = False
        self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` the way a GPU would."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            found = func(*args, **kwargs)
            asks = sys._getframe(1).f_globals.get("__name__", "")
            is_false = isinstance(found, torch.device) and found.type == "meta" and not asks.startswith("torch.")
            return _CPU if is_false else found
        if func is torch.autograd.backward:
            return self._backward(args[0])
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = self._autocast(name, args, kwargs)
        if name == "scaled_dot_product_attention":
            return _attend(self.fused, *args, **kwargs)
        if func is functional.dropout and self.fused:
            return _fused_dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(self, losses: tuple[Tensor, ...]) -> None:
        """The engine sees the modes that are on when it starts, and recomputed layers need this one."""
        ones = tuple(torch.ones_like(loss) for loss in losses)
        with self:
            Variable._execution_engine.run_backward(
                losses, ones, False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _autocast(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if name in _FLOAT_RESULT and kwargs.get("dtype") is None:
            is_low = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors_in(args, kwargs))
            return args, {**kwargs, "dtype": torch.float32} if is_low else kwargs
        if name in _HALF or name in _FLOAT:
            dtype = torch.get_autocast_dtype("cpu") if name in _HALF else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._cast(tensor, dtype), (args, kwargs))
        return args, kwargs

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype or tensor.dtype not in _FLOATS:
            return tensor
        if not (self._keeps_casts and dtype != torch.float32 and tensor.requires_grad and tensor.is_leaf):
            return tensor.to(dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(dtype)
        return self._casts[id(tensor)]


class MetaOperations:
    """Lets real integers on the CPU (ids, positions: their values decide sizes) meet meta tensors.

    What meets a meta tensor is moved there for the one operation. Results of operations that neither share nor
    change their arguments are remembered by shape: layers repeat. ``is_step``: new floats are meta tensors wherever
    they are asked for, because ``GpuCalls`` gives meta tensors a false device.
    """

    def __init__(self, is_step: bool) -> None:
        self._is_step = is_step
        self._remembered: dict[Any, Any] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of ``func``; one meta argument makes it a meta operation."""
        tensors = tensors_in(args, kwargs)
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs) if tensors else self._make(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        if func is torch.ops.aten.masked_scatter_backward.default:  # selects by a mask, which has no values here
            return args[0].new_empty(args[2])
        if not all(tensor.is_meta for tensor in tensors):
            moved = tree_map_only(Tensor, lambda tensor: tensor.to(_META), (args, kwargs))
            result = func(*moved[0], **moved[1])
            return args[0] if func._schema.is_mutable else result
        if not _is_pure(func):
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key in self._remembered:
            return _renew(self._remembered[key])
        result = func(*args, **kwargs)
        given = {storage_key(tensor) for tensor in tensors}
        if not any(storage_key(tensor) in given for tensor in tensors_in((result,))):  # a view that does not say so
            self._remembered[key] = _layout(result)
        return result

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A new tensor; whether it holds floats is known once it is there."""
        if self._is_step and kwargs.get("device") == _CPU:
            made = func(*args, **{**kwargs, "device": _META})
            if made.is_floating_point():
                return made
        return func(*args, **kwargs)


@cache
def _is_pure(func: Any) -> bool:
    values = [*func._schema.arguments, *func._schema.returns]
    return all(value.alias_info is None for value in values)


@dataclass(frozen=True)
class _Layout:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _layout(value: Any) -> Any:
    """A result without its storage."""
    if isinstance(value, Tensor):
        return _Layout(value.shape, value.stride(), value.dtype)
    return tuple(map(_layout, value)) if isinstance(value, list | tuple) else value


def _key(value: Any) -> Any:
    """An argument as something hashable; 1, 1.0 and True are equal but give different dtypes."""
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return _layout(value) if isinstance(value, Tensor) else (type(value), value)


def _renew(layout: Any) -> Any:
    if isinstance(layout, _Layout):
        return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=_META)
    return tuple(map(_renew, layout)) if isinstance(layout, tuple) else layout


def kernel_workspace(func: Any, args: Any, result: Any) -> int:
    """Bytes that CUDA kernels of this operation allocate for themselves; only those that can matter."""
    name = _name(func)
    if name == "aten.masked_scatter.default":  # the mask as wide as the tensor, and its prefix sum in int64
        return 9 * int(result.numel())
    if name == "aten.masked_scatter_backward.default":  # the mask again, and three int64 coordinates per value
        return int(args[0].numel()) + 24 * int(result.numel())
    if name == "bitsandbytes.gemm_4bit.default":  # many rows: the whole weight is unpacked first
        return int(args[2][0]) * int(args[2][1]) * int(args[0].element_size())
    if name == "bitsandbytes.int8_scaled_mm.default":  # products in int32 before they are scaled
        return 4 * int(result.numel())
    return 0


_name = cache(str)


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One kernel that keeps a mask of bytes, where a CPU keeps a mask in the input's dtype."""
    if not training or p == 0.0 or inplace:
        return functional.dropout(input, p, training, inplace)
    dropped: Tensor = torch.native_dropout(input, p, True)[0]
    return dropped


def _attend(
    fused: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:
    """query [B, H, T, d] -> [B, H, T, d]; scores [T, T] are stored on a CPU with dropout only."""
    if dropout_p and not fused:
        stored: Tensor = functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
        return stored
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # kernels add masks: a copy in the dtype of the scores
        attn_mask = query.new_empty(attn_mask.shape)
    attended: Tensor = _Attention.apply(query, key, value, attn_mask, fused)
    return attended


class _Attention(torch.autograd.Function):
    """What flash and memory-efficient attention keep for the backward pass: q, k, v, output, log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, fused: bool) -> Tensor:
        """Allocates the output in the layout the kernels give it."""
        batch, heads, length, _ = query.shape
        if fused and query.dtype != torch.float32:
            output = torch.empty_like(query)
        else:
            output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, log_sum)
        ctx.fused = fused
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Three gradients; CUDA's kernel sums that of the query in float32, rows in blocks of 128."""
        query, key, value, *_ = ctx.saved_tensors
        batch, heads, length, width = query.shape
        if ctx.fused:
            rows, columns = -(-length // 128) * 128, -(-width // 32) * 32 + 1  # one for the sum of o * do
            workspace = query.new_empty(batch, rows, heads, columns, dtype=torch.float32)
            del workspace
            return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
        grads = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value))
        return *grads, None, None
