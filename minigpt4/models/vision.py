"""Vision towers: EVA ViT-g/14 of BLIP-2 (timm's Eva) and any other timm ViT."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import CheckpointError, ConfigError, nearest
from minigpt4.common.schema import ModelConfig
from minigpt4.models.weights import find_weights, read_state
from minigpt4.processors.base import CLIP_MEAN, CLIP_STD

log = logging.getLogger(__name__)

EVA_FILE = "eva_vit_g.pth"
_EVA_CLIP_G = {"patch_size": 14, "embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 4.3637}


@dataclass(frozen=True)
class VisionInfo:
    """What the model must know of its tower: width C, prefix tokens, patches, normalisation of its images."""

    width: int
    num_prefix_tokens: int
    num_patches: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def build_vision(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, VisionInfo]:
    """The tower with its weights. Calling it gives tokens [N, prefix + patches, C].

    ``eva_clip_g`` and ``eva`` (sizes in ``vit_config``) return the last block's output without a final norm, as BLIP-2
    does; other timm towers return ``forward_features``. Raises ConfigError for unknown names and sizes.
    """
    if cfg.vit_model in ("eva_clip_g", "eva"):
        sizes = {**(_EVA_CLIP_G if cfg.vit_model == "eva_clip_g" else {}), **cfg.vit_config}
        return _build_eva(cfg, sizes, device, dtype)
    return _build_timm(cfg, device, dtype)


def check_patches(image_size: int, patch_size: int) -> None:
    """Raises ConfigError when the image does not divide into patches."""
    if image_size % patch_size:
        low = image_size // patch_size * patch_size
        raise ConfigError(
            f"model.image_size {image_size} is not divisible by the patch size {patch_size}; "
            f"nearest: {low or patch_size} or {low + patch_size}"
        )


def check_merge(info: VisionInfo, group: int) -> None:
    """Raises ConfigError when the patches do not divide into groups."""
    if info.num_patches % group:
        raise ConfigError(
            f"model.image_size gives {info.num_patches} patches, which do not divide into groups of {group}"
        )


def _build_eva(
    cfg: ModelConfig, sizes: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, VisionInfo]:
    from timm.models.eva import Eva

    missing = [key for key in ("patch_size", "embed_dim", "depth", "num_heads") if key not in sizes]
    if missing:
        raise ConfigError(f"model.vit_config of vit_model '{cfg.vit_model}' lacks {', '.join(missing)}")
    check_patches(cfg.image_size, int(sizes["patch_size"]))
    has_file = cfg.vit_weights != "random" and device.type != "meta"  # on meta: shapes alone
    weights = find_weights(cfg.vit_weights or EVA_FILE, "model.vit_weights") if has_file else None
    # Random initialisation of 39 blocks takes half a minute; with a file the tower starts without memory.
    with torch.device("meta" if has_file or device.type == "meta" else "cpu"):
        tower = Eva(
            img_size=cfg.image_size,
            num_classes=0,
            global_pool="",
            qkv_bias=True,
            qkv_fused=True,
            use_post_transformer_norm=False,
            use_fc_norm=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            drop_path_rate=cfg.drop_path_rate,
            **sizes,
        )
    if weights is not None:
        load_eva(tower, read_state(weights), str(weights))
    if cfg.use_grad_checkpoint and not cfg.freeze_vit:  # a frozen tower builds no graph: nothing to save
        tower.set_grad_checkpointing(True)
    side = cfg.image_size // int(sizes["patch_size"])
    info = VisionInfo(int(sizes["embed_dim"]), 1, side * side, CLIP_MEAN, CLIP_STD)
    return tower.to(device=device, dtype=dtype), info


def load_eva(tower: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load an EVA state dict (BLIP-2 names = timm names) into ``tower``, which may be on the meta device.

    The position table is resized without antialias, in float32, as BLIP-2 does; blocks beyond the tower's depth and
    the head of the published file are not part of the tower. Raises CheckpointError for anything missing.
    """
    wanted = {name: value.shape for name, value in tower.state_dict().items()}
    loaded = {name: value for name, value in state.items() if name in wanted}
    missing = sorted(set(wanted) - set(loaded))
    if missing:
        raise CheckpointError(f"{source}: the vision tower lacks {len(missing)} tensors, first: {missing[0]}")
    loaded["pos_embed"] = resize_position_table(loaded["pos_embed"], wanted["pos_embed"][1])
    wrong = [name for name, value in loaded.items() if value.shape != wanted[name]]
    if wrong:
        raise CheckpointError(
            f"{source}: shape of {wrong[0]} is {list(loaded[wrong[0]].shape)}, the tower has {list(wanted[wrong[0]])}"
        )
    tower.load_state_dict({name: value.float() for name, value in loaded.items()}, strict=True, assign=True)
    blocks: Any = tower.blocks
    for block in blocks:
        # k has no bias: a zero buffer that is not in files and would stay on the meta device.
        block.attn.k_bias = torch.zeros_like(block.attn.q_bias)


def resize_position_table(table: Tensor, num_tokens: int) -> Tensor:
    """[1, 1 + g*g, C] -> [1, num_tokens, C]: bicubic, align_corners False, no antialias, float32."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    if table.shape[1] == num_tokens:
        return table
    side = int((num_tokens - 1) ** 0.5)
    resized: Tensor = resample_abs_pos_embed(table.float(), [side, side], num_prefix_tokens=1, antialias=False)
    return resized


class _TimmFeatures(nn.Module):
    """A timm ViT whose call returns all tokens instead of pooled features."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, S, S] -> tokens [N, prefix + patches, C]."""
        tokens: Tensor = self.vit.forward_features(images)
        return tokens


def _build_timm(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, VisionInfo]:
    import timm

    if not timm.is_model(cfg.vit_model):
        raise ConfigError(
            f"model.vit_model: unknown tower '{cfg.vit_model}'{nearest(cfg.vit_model, timm.list_models())}"
        )
    is_skeleton = device.type == "meta"
    with torch.device("meta" if is_skeleton else "cpu"):
        vit: Any = timm.create_model(
            cfg.vit_model,
            pretrained=not cfg.vit_weights and not is_skeleton,
            num_classes=0,
            img_size=cfg.image_size,
            **cfg.vit_config,
        )
    if cfg.vit_weights and cfg.vit_weights != "random" and not is_skeleton:
        path = find_weights(cfg.vit_weights, "model.vit_weights")
        vit.load_state_dict(read_state(path), strict=True)
    grid = vit.patch_embed.grid_size
    num_patches = int(grid[0]) * int(grid[1])
    mean, std = tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
    info = VisionInfo(int(vit.num_features), int(vit.num_prefix_tokens), num_patches, mean, std)
    return _TimmFeatures(vit).to(device=device, dtype=dtype), info
