"""BLIP-2's Q-Former (transformers' Blip2QFormerModel) under the published tensor names."""

from __future__ import annotations

from typing import Any

_TO_PUBLISHED = (
    ("layernorm.", "embeddings.LayerNorm."),
    (".attention.attention.", ".attention.self."),
    (".crossattention.attention.", ".crossattention.self."),
)


def build_qformer(encoder_width: int, overrides: dict[str, Any]) -> Any:
    """BERT-base sized by default, cross-attention in every second layer, query branch only."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    sizes = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "cross_attention_frequency": 2,
        **overrides,
    }
    config = Blip2QFormerConfig(
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        encoder_hidden_size=encoder_width,
        use_qformer_text_input=False,
        attention_probs_dropout_prob=0.1,
        hidden_dropout_prob=0.1,
        **sizes,
    )
    return Blip2QFormerModel(config)


def published_name(name: str) -> str:
    """``qformer.encoder...`` of transformers -> ``Qformer.bert.encoder...`` of BLIP-2 files."""
    inner = name.removeprefix("qformer.")
    for ours, theirs in _TO_PUBLISHED:
        inner = theirs + inner.removeprefix(ours) if inner.startswith(ours) else inner.replace(ours, theirs)
    return f"Qformer.bert.{inner}"
