"""BLIP-2's Q-Former (transformers' Blip2QFormerModel) and the file it is published in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minigpt4.common.errors import CheckpointError
from minigpt4.models.load_report import LoadReport
from minigpt4.models.weights import Weights

BLIP2_FILE = "blip2_pretrained_flant5xxl.pth"

# What whole BLIP-2 files hold besides: BERT's text branch and head, the vision tower, projections of other LMs, heads.
_NOT_OURS = re.compile(
    r"Qformer\.(cls\.|bert\.(embeddings\.(position_ids$|word_embeddings\.|position_embeddings\.)|pooler\.)"
    r"|bert\.encoder\.layer\.\d+\.(intermediate|output)\.)"
    r"|(visual_encoder|opt_proj|t5_proj|opt_model|t5_model|vision_proj|text_proj|itm_head)\.|temp$"
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


def load_blip2(parameters: Mapping[str, nn.Parameter], weights: Weights) -> LoadReport:
    """Copy Q-Former, query tokens and ``ln_vision`` out of a BLIP-2 file.

    parameters: published name -> parameter; the file must hold every one in its shape. The rest of the file is not
    used. Raises CheckpointError naming the first tensor that is missing or has another shape.
    """
    source = weights.source
    state = {name.removeprefix("module."): value for name, value in weights.tensors.items()}
    report = LoadReport(source)
    missing = sorted(set(parameters) - set(state))
    if missing:
        raise CheckpointError(
            f"{source}: lacks {len(missing)} of the {len(parameters)} tensors of the Q-Former, first: {missing[0]}"
        )
    for name, parameter in parameters.items():
        found, ours = list(state[name].shape), list(parameter.shape)
        if found != ours:
            raise CheckpointError(f"{source}: {name} is {found}, the model has {ours}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    report.add_loaded(parameters)
    for name in sorted(set(state) - set(parameters)):
        (report.ignored if _NOT_OURS.match(name) else report.unexpected).append(name)
    return report
