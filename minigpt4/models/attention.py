"""Attention over packed rows: every sample by itself, so that none sees another and no T x T mask is built.

Registered with transformers' AttentionInterface. Without ``sample_lengths`` it is transformers' own SDPA attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "packed_sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [R, H, T, d], key and value [R, H', T, d] -> [R, T, H, d].

    ``sample_lengths`` (one row only): samples stand one behind another; each attends causally to itself.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sample_lengths is None:
        new, known = query.shape[2], key.shape[2]
        if attention_mask is None and 1 < new < known:  # a cache holds the first ones: the new are causal at the end
            attention_mask = torch.ones(1, 1, new, known, dtype=torch.bool, device=query.device).tril(known - new)
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    lengths = list(sample_lengths)
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        functional.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=kwargs.get("dropout", 0.0) if module.training else 0.0,
            scale=kwargs.get("scaling"),
            is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask where nothing is padded: causality and the bounds of samples are the attention's own business."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(attention_mask=attention_mask, **kwargs)
    return mask


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
