"""The frozen vision part of a model as one thing: whether there is one, what identifies it, its output, its end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minigpt4.models.base_model import BaseModel
from minigpt4.models.vision_key import vision_settings


def vision_parameters(model: BaseModel) -> list[tuple[str, nn.Parameter]]:
    """Everything between pixels and ``project``: what belongs neither to the language model nor to the projection."""
    projection = {id(parameter) for parameter in model.projection_parameters()}
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not name.startswith("llama_model.") and id(parameter) not in projection
    ]


def why_not_frozen(model: BaseModel) -> str:
    """Which part of vision trains; empty when none does."""
    trained = [name for name, parameter in vision_parameters(model) if parameter.requires_grad]
    return f"{trained[0].split('.')[0]} trains ({len(trained)} tensors)" if trained else ""


def identity(model: BaseModel) -> dict[str, str]:
    """What decides the features of given pixels: architecture, settings, dtypes and every value of the weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in vision_parameters(model):
        digest.update(f"{name}\0{parameter.dtype}\0{list(parameter.shape)}\0".encode())
        values = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "settings": vision_settings(model.cfg),
        "arithmetic": str(model.dtype).removeprefix("torch."),
        "weights": digest.hexdigest(),
    }


@torch.no_grad()
def frozen_features(model: BaseModel, pixels: Tensor) -> Tensor:
    """pixels [N, 3, S, S] -> features [N, P, C'] on the CPU, in the dtype of the model's arithmetic."""
    model.load_vision()
    with model.autocast():
        features = model.vision_features(pixels.to(model.device))
    return features.to(model.dtype).cpu()


def feature_shape(model: BaseModel) -> tuple[int, int]:
    """(P, C') of one picture; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    side = model.cfg.image_size
    with torch.no_grad(), model.autocast(), FakeTensorMode(allow_non_fake_inputs=True):
        features = model.vision_features(torch.zeros(1, 3, side, side, device=model.device))
    return int(features.shape[1]), int(features.shape[2])


def releasable(model: BaseModel) -> Iterator[tuple[str, bool]]:
    """(name, whether a copy goes to the CPU) of every child that ``release`` frees."""
    vision = {id(parameter) for _, parameter in vision_parameters(model)}
    kept = {id(parameter) for _, parameter in model.frozen_without_file()}
    for name, child in model.named_children():
        own = {id(parameter) for parameter in child.parameters()}
        if own and own <= vision:
            yield name, not own.isdisjoint(kept)


def release(model: BaseModel) -> int:
    """Frees the vision part, whose features are known; returns the bytes that left the device.

    Weights without a file go to the CPU, as checkpoints hold them. The model reads no pixels any more.
    """
    freed = 0
    for name, is_kept in releasable(model):
        child, target = model.get_submodule(name), torch.device("cpu" if is_kept else "meta")
        freed += sum(p.numel() * p.element_size() for p in child.parameters() if p.device != target)
        child.to(target)
    if freed and model.device.type == "cuda":
        torch.cuda.empty_cache()  # otherwise torch keeps it for tensors of the same size
    model.reads_pixels = False
    return freed
