"""Back ends of attention over packed rows: ways to compute the same block-diagonal causal attention.

``per_sample`` is the reference: one call of PyTorch's fused attention per sample. The others are taken only after they
have given its values and gradients on this machine, in this run's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4.common.errors import ConfigError

_LENGTHS = (5, 19, 1, 8)
"""Of the samples on which back ends are compared; no multiples of a block."""
_CPU_QUERIES = 128
_HALF = (torch.float16, torch.bfloat16)
FAILURES = (RuntimeError, ImportError, NotImplementedError, TypeError, ValueError, AttributeError, AssertionError)
"""What a kernel that this machine or this PyTorch does not have raises."""


@dataclass(frozen=True)
class Options:
    """lengths: of the samples, in order. dropout: share of attention weights; scale: None = 1 / sqrt(d)."""

    lengths: tuple[int, ...]
    dropout: float
    scale: float | None


Backend = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
"""query [1, H, T, d], key and value [1, H', T, d] -> [1, H, T, d]."""


def per_sample(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """Every sample by itself: no mask, and the same kernel as for a row of one sample."""
    parts = zip(*(torch.split(tensor, list(options.lengths), dim=2) for tensor in (query, key, value)), strict=True)
    attended = [piece for q, k, v in parts for piece in _one_sample(q, k, v, options)]
    return torch.cat(attended, dim=2)


def _one_sample(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Iterator[Tensor]:
    """Causal attention of one sample, in parts along its positions.

    PyTorch's kernel for CPUs computes the half that causality hides too: there, queries of a long sample are asked for
    a few at a time, with the keys up to their end.
    """
    length = query.shape[2]
    if query.device.type != "cpu" or options.dropout or length <= _CPU_QUERIES:
        yield _sdpa(query, key, value, options, is_causal=True)
        return
    num_parts = -(-length // _CPU_QUERIES)
    for number in range(num_parts):
        start, end = (length * n // num_parts for n in (number, number + 1))
        seen = _seen(end - start, end)
        yield _sdpa(query[:, :, start:end], key[:, :, :end], value[:, :, :end], options, attn_mask=seen)


def mask(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """One call with a [T, T] mask: few launches, but memory and time grow with the square of the row."""
    allowed = _mask(options.lengths, query.device)
    return _sdpa(query, key, value, options, attn_mask=allowed)


def varlen(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """Flash attention over sample bounds in one launch (``torch.nn.attention.varlen``); 16 bits on a GPU only."""
    from torch.nn.attention import varlen as kernels

    if options.dropout or query.dtype not in _HALF:
        return per_sample(query, key, value, options)
    bounds, longest = _bounds(options.lengths, query.device), max(options.lengths)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, d]
    attend: Any = kernels.varlen_attn  # its types differ between versions of PyTorch
    more: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    attended: Tensor = attend(
        q, k, v, bounds, bounds, longest, longest, scale=options.scale, window_size=(-1, 0), **more
    )
    return attended.transpose(0, 1)[None]


def flex(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """A compiled kernel that skips blocks between samples (``torch.nn.attention.flex_attention``)."""
    if options.dropout:
        return per_sample(query, key, value, options)
    attended: Tensor = _flex(query.device.type)(
        query,
        key,
        value,
        block_mask=_blocks(options.lengths, query.device),
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended


BACKENDS: dict[str, Backend] = {"varlen": varlen, "flex": flex, "mask": mask, "per_sample": per_sample}


@dataclass(frozen=True)
class Shape:
    """Of one layer's attention."""

    heads: int
    kv_heads: int
    width: int


def choose(wanted: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name of the back end to use, and why. ``auto``: varlen where it proves itself on this GPU, else per_sample.

    Raises ConfigError when the one that was asked for does not work here.
    """
    if wanted != "auto":
        reason = problem(wanted, shape, device, dtype)
        if reason:
            raise ConfigError(f"run.packing_backend: {wanted} does not work here: {reason}; use auto")
        return wanted, "as asked for"
    if device.type != "cuda" or dtype not in _HALF:
        return "per_sample", "varlen kernels need a GPU and 16 bits"
    reason = problem("varlen", shape, device, dtype)
    return ("per_sample", f"no varlen: {reason}") if reason else ("varlen", "equal to per_sample here")


def problem(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """Why a back end cannot be used: what it raises, or how far values or gradients are from per_sample's; or ''."""
    if name == "per_sample" or device.type == "meta":
        return ""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, heads, sum(_LENGTHS), shape.width) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    inputs = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    weight = torch.randn(sizes[0], generator=generator).to(device, dtype)
    try:
        found = _values_and_gradients(BACKENDS[name], inputs, weight)
    except FAILURES as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    right = _values_and_gradients(per_sample, inputs, weight)
    allowed = 3e-2 if dtype in _HALF else 1e-4
    for what, one, other in zip(("values", "query", "key", "value"), found, right, strict=True):
        difference = float((one.float() - other.float()).norm() / other.float().norm())
        if not difference <= allowed:
            kind = what if what == "values" else f"gradients of {what}"
            return f"{kind} differ by {difference:.2g} from those of samples by themselves"
    return ""


def _values_and_gradients(backend: Backend, inputs: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        query, key, value = leaves
        attended = backend(query, key, value, Options(_LENGTHS, 0.0, None))
        gradients = torch.autograd.grad((attended * weight).sum(), leaves)
    return [attended.detach(), *gradients]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, options: Options, **how: Any) -> Tensor:
    attended: Tensor = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=options.dropout,
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **how,
    )
    return attended


def _documents(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Number of each position's sample, int32 [T]."""
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    # made on the host: made on a GPU, it would be copied there when all that is queued is done
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


# All layers of a row ask for the same; the backward pass of recomputed layers asks again.
@lru_cache(maxsize=2)
def _mask(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    documents = _documents(lengths, device)
    return (documents[:, None] == documents[None, :]).tril()


@lru_cache(maxsize=64)
def _seen(rows: int, keys: int) -> Tensor:
    """Which of ``keys`` the last ``rows`` positions see, bool [rows, keys], on the CPU."""
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


@lru_cache(maxsize=2)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where samples begin, and the end of the last one, int32 [B + 1]."""
    ends = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


@lru_cache(maxsize=2)
def _blocks(lengths: tuple[int, ...], device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    documents = _documents(lengths, device)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[query] == documents[key]) & (query >= key)

    return create_block_mask(allowed, None, None, len(documents), len(documents), device=str(device))


@cache
def _flex(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    if device_type == "cuda":
        attend = torch.compile(attend, dynamic=True)
    return attend
