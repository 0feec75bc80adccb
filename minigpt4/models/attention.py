"""Attention over packed rows: every sample by itself, so that none sees another and no T x T mask is built.

Registered with transformers' AttentionInterface. Without ``sample_lengths`` it is transformers' own SDPA attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.models.packing import BACKENDS, Options

NAME = "packed_sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: Sequence[int] | None = None,
    packing_backend: str = "per_sample",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [R, H, T, d], key and value [R, H', T, d] -> [R, T, H, d].

    ``sample_lengths`` (one row only): samples stand one behind another; each attends causally to itself, computed by
    ``packing_backend``, a name in ``packing.BACKENDS``.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sample_lengths is None:
        new, known = query.shape[2], key.shape[2]
        if attention_mask is None and 1 < new < known:  # a cache holds the first ones: the new are causal at the end
            attention_mask = torch.ones(1, 1, new, known, dtype=torch.bool, device=query.device).tril(known - new)
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    options = Options(
        tuple(sample_lengths), kwargs.get("dropout", 0.0) if module.training else 0.0, kwargs.get("scaling")
    )
    attended = BACKENDS[packing_backend](query, key, value, options)
    return attended.transpose(1, 2).contiguous(), None


def _mask(
    *,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """No mask where nothing is padded: causality and the bounds of samples are the attention's own business.

    But for a cache of one size, in which positions follow that nobody has written yet.
    """
    from transformers.masking_utils import sdpa_mask

    is_full = kv_length == _written(kv_length, **kwargs)
    if attention_mask is None and is_full:
        return None
    mask: Tensor | None = sdpa_mask(
        kv_length=kv_length, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip and is_full,
        **kwargs,
    )  # fmt: skip
    return mask


def _written(
    kv_length: int,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,  # what older transformers say instead of the two
    **kwargs: Any,
) -> int:
    """Positions of a cache after the new ones."""
    if cache_position is not None:
        q_length, q_offset = len(cache_position), cache_position[0]
    return q_length if q_length == kv_length else q_length + int(q_offset)


def use_packed_attention(llm: Any) -> bool:
    """Make ``llm`` attend sample by sample when told their lengths. False where the model has no way to be told.

    A model with a sliding window keeps transformers' masks, which know the window; one whose attention is not plain
    SDPA (capped scores, ALiBi, attention sinks) keeps its own.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    parameters = inspect.signature(llm.get_decoder().forward).parameters.values()
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    kinds = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
    if not takes_more or kinds != {"full_attention"} or getattr(llm.config, "sliding_window", None):
        return False
    if llm.config._attn_implementation not in ("sdpa", NAME) or not llm._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    llm.set_attn_implementation(NAME)
    return True
