"""A model built without reading the files of its frozen vision part, which are read when something needs them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.common.dist import single
from minigpt4.common.errors import CheckpointError
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, ModelConfig, RunConfig
from minigpt4.models import base_model
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import feature_shape, frozen_features, identity
from minigpt4.models.minigpt_v2 import MiniGPTv2
from minigpt4.runners.vision_cache import use_cache
from minigpt4.runners.vision_records import described
from tests.golden_cases import build_config, load_case
from tests.published_files import split_case
from tests.tiny_backbones import tower_keys

CPU = torch.device("cpu")
V2, V1 = "c_minigptv2_lora_instruction", "a_minigpt4_qformer_vicuna"


def known(_: str) -> bool:
    return True


def config(name: str, folder: Path, with_ckpt: bool = False) -> ModelConfig:
    case = load_case(name)
    files = split_case(case, folder)
    return build_config(case, **{key: str(path) for key, path in files.items() if with_ckpt or key != "ckpt"})


def timm_config(folder: Path) -> ModelConfig:
    """A tower of timm whose weights lie in a file."""
    cfg = replace(build_config(load_case(V2)), **tower_keys("siglip"))
    torch.save(built(cfg).visual_encoder.vit.state_dict(), folder / "siglip.pth")
    return replace(cfg, vit_weights=str(folder / "siglip.pth"))


def built(cfg: ModelConfig, **options: Any) -> BaseModel:
    model: BaseModel = registry.get("model", cfg.arch).from_config(cfg, CPU, torch.float32, 7, **options)
    return model


@pytest.mark.parametrize("name", [V2, V1, "siglip"])
def test_a_vision_part_read_late_is_the_one_that_is_read_at_once(name: str, tmp_path: Path) -> None:
    cfg = timm_config(tmp_path) if name == "siglip" else config(name, tmp_path)
    expected, late = built(cfg), built(cfg, is_vision_known=known)
    assert late.vision_key == expected.vision_key != ""
    assert all(parameter.is_meta for parameter in late.visual_encoder.parameters())
    pixels = torch.rand(1, 3, cfg.image_size, cfg.image_size)
    assert torch.equal(frozen_features(late, pixels), frozen_features(expected, pixels))
    states = expected.state_dict()
    assert all(torch.equal(value, states[key]) for key, value in late.state_dict().items())
    assert [name for name, p in late.named_parameters() if p.requires_grad] == [
        name for name, p in expected.named_parameters() if p.requires_grad
    ]
    assert sorted(report.source for report in late.load_reports) == sorted(r.source for r in expected.load_reports)


@pytest.mark.parametrize("name", [V2, V1])
def test_a_checkpoint_of_what_trains_leaves_the_tower_unread(name: str, tmp_path: Path) -> None:
    model = built(config(name, tmp_path, with_ckpt=True), is_vision_known=known)
    assert not model.has_vision and model.vision_key


def test_vision_weights_of_a_checkpoint_are_put_into_a_tower_that_was_read(tmp_path: Path) -> None:
    cfg = config(V2, tmp_path)
    name = "visual_encoder.blocks.0.norm1.bias"
    torch.save({"model": {name: torch.full_like(built(cfg).state_dict()[name], 3.0)}}, tmp_path / "trained.pth")
    model = built(replace(cfg, ckpt=str(tmp_path / "trained.pth")), is_vision_known=known)
    assert model.has_vision and not model.vision_key
    assert (model.state_dict()[name] == 3).all()


def test_another_file_another_setting_and_another_time_have_another_key(tmp_path: Path) -> None:
    cfg = config(V2, tmp_path)
    keys = {built(cfg, is_vision_known=known).vision_key}
    keys.add(built(replace(cfg, vision_tokens_per_position=2), is_vision_known=known).vision_key)
    os.utime(cfg.vit_weights, ns=(1, 1))
    keys.add(built(cfg, is_vision_known=known).vision_key)
    assert len(keys) == 3
    assert built(replace(cfg, max_txt_len=50, lora_r=2), is_vision_known=known).vision_key in keys


def test_what_trains_is_random_or_of_a_class_of_its_own_is_read_at_once(tmp_path: Path) -> None:
    class Own(MiniGPTv2):
        """May build more in its constructor."""

    def key(cfg: ModelConfig) -> str:
        return built(cfg).vision_key

    cfg = config(V2, tmp_path)
    assert not key(replace(cfg, freeze_vit=False)) and not key(replace(cfg, vit_weights="random"))
    assert not Own.from_config(cfg, CPU, torch.float32).vision_key
    first = config(V1, tmp_path)
    assert key(first) and not key(replace(first, freeze_qformer=False, cache_vision="off"))


def put_another(cfg: ModelConfig) -> None:
    """A file of other weights in the place of the tower's, as ``mv new old`` leaves it."""
    path = Path(cfg.vit_weights)
    tensors = torch.load(path, weights_only=True)
    torch.save({name: value + 1 for name, value in tensors.items()}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def test_weights_that_change_before_they_are_read_end_the_run(tmp_path: Path) -> None:
    cfg = timm_config(tmp_path)
    model = built(cfg, is_vision_known=known)
    put_another(cfg)
    with pytest.raises(CheckpointError, match=r"siglip.pth: changed since this run began"):
        frozen_features(model, torch.rand(1, 3, cfg.image_size, cfg.image_size))


def test_weights_that_change_while_a_model_is_built_are_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = timm_config(tmp_path)
    check = base_model.check_llm

    def slow_check(*arguments: Any) -> None:
        check(*arguments)
        put_another(cfg)

    monkeypatch.setattr(base_model, "check_llm", slow_check)
    assert not built(cfg).vision_key
    monkeypatch.undo()
    assert built(cfg).vision_key


def test_weights_written_over_with_their_old_time_have_another_key(tmp_path: Path) -> None:
    cfg = timm_config(tmp_path)
    path, before = Path(cfg.vit_weights), built(cfg).vision_key
    stat = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_ino == stat.st_ino and built(cfg).vision_key != before


def test_a_cache_nobody_may_write_to_is_used_all_the_same(tmp_path: Path) -> None:
    model = built(timm_config(tmp_path))
    (tmp_path / "cache").write_text("no folder")  # whoever runs the tests may write everywhere
    about, shape = described(model, tmp_path / "cache", single("cpu"))
    assert about == identity(model) and shape == feature_shape(model)


def test_without_data_sets_the_tower_is_read_for_what_else_has_pictures(tmp_path: Path) -> None:
    cfg = replace(timm_config(tmp_path), cache_vision="disk")
    model = built(cfg, is_vision_known=known)
    run = Config(model=cfg, datasets={}, run=RunConfig(cache_root=str(tmp_path / "cache")))
    assert use_cache(run, model, [], single("cpu"), 1.0) == {}
    assert model.has_vision
