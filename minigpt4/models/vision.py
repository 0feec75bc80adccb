"""Vision towers: EVA ViT-g/14 of BLIP-2 (timm's Eva) and any other timm ViT."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.schema import ModelConfig
from minigpt4.models.load_report import LoadReport
from minigpt4.models.timm_tower import applies_final_norm, check_patches, create_tower
from minigpt4.models.weights import Weights, find_weights, read_weights
from minigpt4.processors.base import CLIP_MEAN, CLIP_STD

log = logging.getLogger(__name__)

EVA_FILE = "eva_vit_g.pth"
_PUBLISHED_SIZES = (224, 448)  # of eva_clip_g: trained at 224, published models of both sizes use it
_HEADS = re.compile(r"(norm|fc_norm|attn_pool|head|lm_head)\.|mask_token$")  # behind the tokens: not read here
_EVA_CLIP_G = {"patch_size": 14, "embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 4.3637}


@dataclass(frozen=True)
class VisionInfo:
    """What the model must know of its tower: width C, prefix tokens (class, registers), patches, normalisation of its
    images, and whether its tokens come out normalised."""

    width: int
    num_prefix_tokens: int
    num_patches: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_normed: bool = False


def build_vision(
    cfg: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, VisionInfo, LoadReport | None]:
    """The tower with its weights, and what was loaded from a file. Calling it gives tokens [N, prefix + patches, C].

    ``eva_clip_g`` and ``eva`` (sizes in ``vit_config``) return the last block's output without a final norm, as BLIP-2
    does; other timm towers return ``forward_features``. Raises ConfigError for unknown names and sizes.
    """
    # A file fills every value: what timm draws before must not move what is drawn later, whenever the file is read.
    with torch.random.fork_rng(devices=[], enabled=bool(tower_file(cfg))):
        if cfg.vit_model in ("eva_clip_g", "eva"):
            sizes = {**(_EVA_CLIP_G if cfg.vit_model == "eva_clip_g" else {}), **cfg.vit_config}
            return _build_eva(cfg, sizes, device, dtype)
        return _build_timm(cfg, device, dtype)


def check_merge(cfg: ModelConfig, info: VisionInfo) -> None:
    """Raises ConfigError when the patches do not divide into groups of ``vision_tokens_per_position``."""
    group = cfg.vision_tokens_per_position
    if info.num_patches % group == 0:
        return
    side = math.isqrt(info.num_patches)
    patch = cfg.image_size // side
    smaller = next((n for n in range(side - 1, 0, -1) if n * n % group == 0), None)
    larger = next(n for n in range(side + 1, side + group + 1) if n * n % group == 0)  # the next multiple of group
    sizes = " or ".join(str(n * patch) for n in (smaller, larger) if n)
    groups = ", ".join(str(n) for n in range(1, 17) if info.num_patches % n == 0)
    raise ConfigError(
        f"model.image_size {cfg.image_size} gives {side} x {side} = {info.num_patches} patches, which do not divide "
        f"into groups of {group}; image_size {sizes} does, or set vision_tokens_per_position: {groups}"
    )


def merge_tokens(tokens: Tensor, info: VisionInfo, group: int) -> Tensor:
    """tokens [N, prefix + P*group, C] -> [N, P, group*C]: ``group`` consecutive raster tokens side by side."""
    patches = tokens[:, info.num_prefix_tokens :]  # [N, P*group, C]
    return patches.reshape(len(patches), -1, group * patches.shape[-1])


def tower_file(cfg: ModelConfig) -> str:
    """The file of the tower's weights as a path, a name or a web address; "" where there is none to look for."""
    if cfg.vit_weights == "random" or (not cfg.vit_weights and cfg.vit_model not in ("eva_clip_g", "eva")):
        return ""
    return cfg.vit_weights or EVA_FILE


def _build_eva(
    cfg: ModelConfig, sizes: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, VisionInfo, LoadReport | None]:
    from timm.models.eva import Eva

    missing = [key for key in ("patch_size", "embed_dim", "depth", "num_heads") if key not in sizes]
    if missing:
        raise ConfigError(f"model.vit_config of vit_model '{cfg.vit_model}' lacks {', '.join(missing)}")
    check_patches(cfg.image_size, int(sizes["patch_size"]))
    path = tower_file(cfg)
    is_skeleton = device.type == "meta"  # shapes alone
    # Random initialisation of 39 blocks takes half a minute; with a file the tower starts without memory.
    with torch.device("meta" if path or is_skeleton else "cpu"):
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
    report = None
    if path and not is_skeleton:
        weights = read_weights(find_weights(path, "model.vit_weights"))
        report = load_tower(tower, weights, cfg, device, dtype)
        blocks: Any = tower.blocks
        for block in blocks:  # k has no bias: a zero buffer that is not in files and would stay on the meta device
            block.attn.k_bias = torch.zeros_like(block.attn.q_bias)
    if cfg.use_grad_checkpoint and not cfg.freeze_vit:  # a frozen tower builds no graph: nothing to save
        tower.set_grad_checkpointing(True)
    side = cfg.image_size // int(sizes["patch_size"])
    info = VisionInfo(int(sizes["embed_dim"]), 1, side * side, CLIP_MEAN, CLIP_STD)
    return tower.to(device=device, dtype=dtype), info, report


def load_tower(tower: Any, weights: Weights, cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> LoadReport:
    """Put a timm tower's tensors in place, one after another, in their final ``dtype`` on ``device``.

    ``tower`` may be on the meta device: its parameters are replaced. A position table of another size is resized in
    float32. Blocks beyond the tower's depth, final norms and heads of published files are not part of it.
    Raises CheckpointError for anything that is missing or has another shape.
    """
    source, state = weights.source, weights.tensors
    wanted: dict[str, Tensor] = tower.state_dict()
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise CheckpointError(
            f"{source}: lacks {len(missing)} of the {len(wanted)} tensors of the vision tower, first: {missing[0]}"
        )
    report = LoadReport(source)
    placed: dict[str, Tensor] = {}
    for name, ours in wanted.items():
        value = state[name]
        if name == "pos_embed" and value.dim() == 3 and value.shape[1] != ours.shape[1]:
            num_prefix = 0 if getattr(tower, "no_embed_class", False) else int(tower.num_prefix_tokens)
            side = math.isqrt(max(value.shape[1] - num_prefix, 0))
            if side and side * side == value.shape[1] - num_prefix:  # any other table is of another kind of tower
                _report_resize(report, side * tower.patch_embed.patch_size[0], cfg)
                value = resize_position_table(value, ours.shape[1], num_prefix)
        if value.shape != ours.shape:
            raise CheckpointError(f"{source}: {name} is {list(value.shape)}, the vision tower has {list(ours.shape)}")
        placed[name] = value.to(device=device, dtype=dtype if ours.is_floating_point() else ours.dtype, copy=True)
    tower.load_state_dict(placed, strict=True, assign=True)
    report.add_loaded(f"visual_encoder.{name}" for name in placed)
    for name in sorted(set(state) - set(wanted)):
        block = re.match(r"blocks\.(\d+)\.", name)
        is_known = _HEADS.match(name) is not None or (block is not None and int(block[1]) >= len(tower.blocks))
        (report.ignored if is_known else report.unexpected).append(f"visual_encoder.{name}")
    return report


def _report_resize(report: LoadReport, trained_size: int, cfg: ModelConfig) -> None:
    line = f"{report.source}: trained at {trained_size} px, model.image_size {cfg.image_size}: position table resized"
    is_usual = cfg.vit_model == "eva_clip_g" and trained_size in _PUBLISHED_SIZES and cfg.image_size in _PUBLISHED_SIZES
    (report.notes if is_usual else report.cautions).append(line)


def resize_position_table(table: Tensor, num_tokens: int, num_prefix: int = 1) -> Tensor:
    """[1, prefix + g*g, C] -> [1, num_tokens, C]: bicubic, align_corners False, no antialias, float32."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    if table.shape[1] == num_tokens:
        return table
    side = math.isqrt(num_tokens - num_prefix)
    resized: Tensor = resample_abs_pos_embed(table.float(), [side, side], num_prefix_tokens=num_prefix, antialias=False)
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


def _build_timm(
    cfg: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, VisionInfo, LoadReport | None]:
    vit = create_tower(cfg, device)
    report = None
    path = tower_file(cfg)
    if path and device.type != "meta":
        report = load_tower(vit, read_weights(find_weights(path, "model.vit_weights")), cfg, device, dtype)
    grid = vit.patch_embed.grid_size
    num_patches = int(grid[0]) * int(grid[1])
    mean, std = tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
    info = VisionInfo(
        int(vit.num_features), int(vit.num_prefix_tokens), num_patches, mean, std, applies_final_norm(vit)
    )
    return _TimmFeatures(vit).to(device=device, dtype=dtype), info, report
