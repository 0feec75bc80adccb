"""``run.parallel: fsdp`` for a vision-language model: where it is built, and what is gathered piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.sharding import shard
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import vision_parameters
from minigpt4.models.llm import causal_lm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def place_around_llm(model: BaseModel, device: torch.device) -> None:
    """Moves everything but the language model, which ``split`` brings over layer by layer: a GPU that does not hold
    all of it never has to."""
    model.device = device
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, child in model.named_children():
        if name != "llama_model" and not any(parameter.is_meta for parameter in child.parameters()):
            child.to(device)
    model.visual_encoder.to(model.vision_dtype())


def split(model: BaseModel, mesh: DeviceMesh) -> None:
    """Splits the weights over the ranks of ``mesh``. A vision part that was freed stays as it is.

    Units are the layers of the language model and the blocks of the tower. All else (embedding, head, projection,
    norms, Q-Former) is the root's, whole during a row. Raises ConfigError for a language model without such layers.
    """
    shard(model, units(model), mesh, model.dtype, left_whole(model))
    model.is_sharded = True


def units(model: BaseModel) -> list[nn.Module]:
    """What is gathered piece by piece, in the order of the forward. Raises ConfigError as ``split`` does."""
    return [*_blocks(model), *_layers(model)]


def left_whole(model: BaseModel) -> list[nn.Parameter]:
    """What is not split: a vision part that was freed."""
    return [] if model.reads_pixels else [parameter for _, parameter in vision_parameters(model)]


def _layers(model: BaseModel) -> list[nn.Module]:
    llm = causal_lm(model.llama_model)
    count = int(llm.config.get_text_config(decoder=True).num_hidden_layers)
    for module in llm.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ConfigError(f"run.parallel fsdp: {type(llm).__name__} keeps its {count} layers in no list; use ddp")


def _blocks(model: BaseModel) -> list[nn.Module]:
    """Of the tower; towers that call theirs otherwise, and one that was freed, have none."""
    for module in model.visual_encoder.modules() if model.reads_pixels else ():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.ModuleList | nn.Sequential):
            return list(blocks)
    return []
