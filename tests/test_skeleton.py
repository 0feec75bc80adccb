"""A model without weights: shapes on the meta device, or random numbers on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from tests.golden_cases import CASES, build_config, load_case

META = torch.device("meta")


@pytest.mark.parametrize("name", CASES[:4])
def test_a_skeleton_has_the_shapes_of_the_model_and_reads_no_weights(name: str, tmp_path: Path) -> None:
    cfg = build_config(load_case(name))
    model_class = registry.get("model", cfg.arch)
    real = model_class.from_config(cfg, torch.device("cpu"), torch.float32)
    (tmp_path / "empty").touch()  # a file that would be refused if anything opened it
    skeleton = model_class.from_config(replace(cfg, ckpt=str(tmp_path / "empty")), META, torch.float32)
    shapes = {key: (value.shape, value.requires_grad) for key, value in real.named_parameters()}
    assert {key: (value.shape, value.requires_grad) for key, value in skeleton.named_parameters()} == shapes
    assert {value.device.type for value in skeleton.parameters()} == {"meta"}
    assert skeleton.encoder.num_image_tokens == real.encoder.num_image_tokens


def test_a_random_language_model_is_made_from_its_config_and_kept_in_checkpoints() -> None:
    cfg = replace(build_config(load_case("c_minigptv2_lora_instruction")), llama_weights="random")
    model_class = registry.get("model", cfg.arch)
    first = model_class.from_config(cfg, torch.device("cpu"), torch.float32, seed=1)
    other = model_class.from_config(cfg, torch.device("cpu"), torch.float32, seed=2)
    state = first.trainable_state()
    frozen = "llama_model.model.layers.0.mlp.up_proj.weight"
    assert frozen in state and not torch.equal(state[frozen], other.trainable_state()[frozen])
    other.load_weights(state, "first", complete=True)
    assert all(torch.equal(value, other.trainable_state()[key]) for key, value in state.items())


def test_random_weights_and_quantisation_exclude_each_other() -> None:
    cfg = build_config(load_case("c_minigptv2_lora_instruction"))
    with pytest.raises(ConfigError, match="llama_weights random cannot be quantised"):
        replace(cfg, llama_weights="random", load_in_4bit=True)
    with pytest.raises(ConfigError, match="llama_weights must be empty or random, got 'rnd'"):
        replace(cfg, llama_weights="rnd")
