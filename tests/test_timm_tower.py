"""Vision transformers of timm by name: told early when they do not fit, loaded from files, trimmed to their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import ModelConfig
from minigpt4.models.timm_tower import POOLING
from minigpt4.models.vision import build_vision, check_merge
from tests.tiny_backbones import TINY_TOWER

CPU = torch.device("cpu")
SIGLIP = "vit_base_patch16_siglip_224"


def config(**changes: Any) -> ModelConfig:
    keys = {"vit_model": SIGLIP, "image_size": 64, "vit_weights": "random", "vit_config": TINY_TOWER}
    return ModelConfig(**{**keys, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit_model": "vit_base_patch16_siglp_224"}, f"unknown tower .*did you mean '{SIGLIP}'"),
        ({"vit_model": f"{SIGLIP}.nothing"}, r"cannot be built: Invalid pretrained tag \(nothing\)"),
        ({"vit_model": "convnext_tiny", "vit_config": {}}, "'convnext_tiny' gives no plain sequence of patch tokens"),
        (
            {"vit_model": "swin_tiny_patch4_window7_224", "vit_config": {}, "image_size": 224},
            "'swin_tiny_patch4_window7_224' gives no plain sequence of patch tokens",
        ),
        ({"vit_config": {"img_size": 64}}, "img_size is model.image_size"),
        ({"vit_config": {"embed_dims": 32}}, "cannot be built: .*'embed_dims'"),
        ({"image_size": 72}, "image_size 72 is not divisible by the patch size 16; nearest: 64 or 80"),
        ({"vit_weights": ""}, f"the weights of '{SIGLIP}' cannot be downloaded"),
    ],
)
def test_a_tower_that_cannot_be_used_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_vision(config(**changes), CPU, torch.float32)


@pytest.mark.parametrize(
    ("size", "group", "message"),
    [
        (378, 4, r"27 x 27 = 729 .* image_size 364 or 392 does, or set vision_tokens_per_position: 1, 3, 9"),
        (14, 4, r"1 x 1 = 1 patches.* image_size 28 does, or set vision_tokens_per_position: 1$"),
        (392, 6, r"28 x 28 = 784 .* image_size 336 or 420 does, .*: 1, 2, 4, 7, 8, 14, 16$"),
    ],
)
def test_a_grid_that_does_not_divide_names_sizes_and_groups_that_do(size: int, group: int, message: str) -> None:
    cfg = config(vit_model="vit_so400m_patch14_siglip_384", image_size=size, vision_tokens_per_position=group)
    info = build_vision(cfg, torch.device("meta"), torch.float32)[1]
    with pytest.raises(ConfigError, match=message):
        check_merge(cfg, info)


@pytest.mark.parametrize("name", [SIGLIP, "eva02_tiny_patch14_224"])
def test_what_stands_behind_the_tokens_is_dropped_and_its_weights_are_passed_over(name: str, tmp_path: Path) -> None:
    size = 64 if name == SIGLIP else 56
    whole = timm.create_model(name, num_classes=7, img_size=size, **TINY_TOWER)
    save_file(whole.state_dict(), tmp_path / "tower.safetensors")
    cfg = config(vit_model=name, image_size=size, vit_weights=str(tmp_path / "tower.safetensors"))
    tower = build_vision(cfg, CPU, torch.float32)[0]
    assert not [key for key, _ in tower.named_parameters() if key.removeprefix("vit.").startswith(POOLING)]
    pixels = torch.randn(1, 3, size, size)
    torch.testing.assert_close(tower.eval()(pixels), whole.eval().forward_features(pixels))


def test_stochastic_depth_and_recomputation_reach_the_tower() -> None:
    cfg = config(drop_path_rate=0.5, use_grad_checkpoint=True, freeze_vit=False)
    tower: Any = build_vision(cfg, CPU, torch.float32)[0]
    assert tower.vit.grad_checkpointing and tower.vit.blocks[1].drop_path1.drop_prob == 0.5
    assert not build_vision(config(use_grad_checkpoint=True), CPU, torch.float32)[0].vit.grad_checkpointing
