"""Any vision transformer of timm, looked at before its weights are read and trimmed to what gives tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.common.schema import ModelConfig

POOLING = ("attn_pool", "fc_norm", "head")
"""What stands behind a tower's tokens: never used here, so its parameters must neither train nor be looked for."""


def create_tower(cfg: ModelConfig, device: torch.device) -> Any:
    """The timm model of ``vit_model``, published weights when ``vit_weights`` is empty; shapes alone on meta.

    A skeleton without memory is checked first. Raises ConfigError for unknown names and sizes, for towers without a
    grid of patch tokens (ConvNeXt, Swin, ...), and for weights that cannot be downloaded.
    """
    import timm

    if not timm.is_model(cfg.vit_model):
        raise ConfigError(
            f"model.vit_model: unknown tower '{cfg.vit_model}'{nearest(cfg.vit_model, timm.list_models())}"
        )
    if "img_size" in cfg.vit_config:
        raise ConfigError("model.vit_config: img_size is model.image_size; remove it there")
    try:
        with torch.device("meta"):
            tower = _create(cfg, pretrained=False)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if "'img_size'" in str(error):
            raise ConfigError(_no_grid(cfg)) from error
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"model.vit_model: '{cfg.vit_model}' cannot be built: {message}") from error
    _check_grid(cfg, tower)
    if device.type != "meta":
        try:
            with torch.device("cpu"):
                tower = _create(cfg, pretrained=not cfg.vit_weights)
        except OSError as error:  # no network, or no such repository
            raise ConfigError(
                f"model.vit_weights: the weights of '{cfg.vit_model}' cannot be downloaded "
                f"({str(error).splitlines()[0]}); name a file in timm's format, or run once with a network"
            ) from error
    for name in POOLING:
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, nn.Identity())
    if cfg.use_grad_checkpoint and not cfg.freeze_vit:  # a frozen tower builds no graph: nothing to save
        tower.set_grad_checkpointing(True)
    return tower


def applies_final_norm(tower: Any) -> bool:
    """Whether the tokens of ``tower`` come out normalised; some towers that average normalise only the average."""
    norm = getattr(tower, "norm", None)
    return norm is not None and not isinstance(norm, nn.Identity)


def _create(cfg: ModelConfig, pretrained: bool) -> Any:
    import timm

    sizes = dict(cfg.vit_config)
    if cfg.drop_path_rate:
        sizes["drop_path_rate"] = cfg.drop_path_rate
    return timm.create_model(cfg.vit_model, pretrained=pretrained, num_classes=0, img_size=cfg.image_size, **sizes)


def _check_grid(cfg: ModelConfig, tower: Any) -> None:
    patches = getattr(tower, "patch_embed", None)
    grid, num_prefix = getattr(patches, "grid_size", None), getattr(tower, "num_prefix_tokens", None)
    if patches is None or grid is None or num_prefix is None:
        raise ConfigError(_no_grid(cfg))
    side = patches.patch_size[0] if isinstance(patches.patch_size, tuple) else int(patches.patch_size)
    check_patches(cfg.image_size, side)


def _no_grid(cfg: ModelConfig) -> str:
    return (
        f"model.vit_model: '{cfg.vit_model}' gives no plain sequence of patch tokens; "
        "take a vision transformer (SigLIP, DINOv2, CLIP, EVA02, DeiT, ...)"
    )


def check_patches(image_size: int, patch_size: int) -> None:
    """Raises ConfigError when the image does not divide into patches."""
    if image_size % patch_size:
        low = image_size // patch_size * patch_size
        raise ConfigError(
            f"model.image_size {image_size} is not divisible by the patch size {patch_size}; "
            f"nearest: {low or patch_size} or {low + patch_size}"
        )
