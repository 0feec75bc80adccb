"""What the planner predicts, against what real steps on the CPU keep alive."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.common.dist import single
from minigpt4.common.errors import ConfigError
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner import probe
from minigpt4.tools.planner.estimate import Planner
from minigpt4.tools.planner.skeleton import POLICIES, Variant
from minigpt4.tools.planner.workload import Row, SampleShape
from tests.plan_parts import LANGUAGE_MODEL, model_config, run_config
from tests.plan_parts import language_model as language_model

PICTURE = SampleShape(images=1, image_tokens=16, prompt=14, answer=40)
QUERIES = SampleShape(images=1, image_tokens=32, prompt=9, answer=20)
TEXT = SampleShape(images=0, image_tokens=16, prompt=30, answer=80)
CASES: dict[str, tuple[str, dict[str, Any], str, Row]] = {
    "LoRA, one packed sample": ("minigpt_v2", {}, "none", Row(1, PICTURE, True, False, "")),
    "LoRA, two packed": ("minigpt_v2", {}, "none", Row(2, PICTURE, True, False, "")),
    "LoRA, four padded": ("minigpt_v2", {}, "none", Row(4, PICTURE, False, False, "")),
    "LoRA, accumulated": ("minigpt_v2", {}, "none", Row(2, PICTURE, False, True, "")),
    "LoRA, recomputed": ("minigpt_v2", {}, "full", Row(4, PICTURE, True, True, "")),
    "LoRA, MLPs recomputed": ("minigpt_v2", {}, "mlp", Row(4, PICTURE, True, True, "")),
    "projection, MLPs recomputed": ("minigpt4", {}, "mlp", Row(4, QUERIES, False, False, "")),
    "MLPs with adapters recomputed": (
        "minigpt_v2", {"lora_target_modules": ["down_proj", "k_proj"]}, "mlp", Row(2, PICTURE, True, False, ""),
    ),
    "LoRA without dropout on other layers": (
        "minigpt_v2", {"lora_dropout": 0.0, "lora_target_modules": ["down_proj", "k_proj"]}, "none",
        Row(2, PICTURE, True, False, ""),
    ),
    "texts only": ("minigpt_v2", {}, "none", Row(2, TEXT, True, False, "")),
    "projection": ("minigpt4", {}, "none", Row(2, QUERIES, True, False, "")),
    "projection, recomputed": ("minigpt4", {}, "full", Row(4, QUERIES, False, False, "")),
    "projection and Q-Former": ("minigpt4", {"freeze_qformer": False}, "none", Row(2, QUERIES, True, True, "")),
    "vision tower": ("minigpt_v2", {"freeze_vit": False, "lora_r": 0}, "none", Row(2, PICTURE, True, False, "")),
    "everything": (
        "minigpt_v2", {"freeze_vit": False, "freeze_llm": False, "lora_r": 0}, "full",
        Row(2, PICTURE, True, True, ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_what_a_real_step_keeps_alive(name: str, language_model: Path) -> None:
    arch, changes, recompute, row = CASES[name]
    cfg = run_config(model_config(language_model, arch, **changes))
    variant = Variant("fp32", "as is", recompute)
    predicted = Planner(cfg, on_gpu=False).estimate(variant, row)
    measured = probe.measure(cfg, variant, row, has_weights=False, dist=single("cpu"))
    # the weights are exact; with them a wrong step would look better than it is
    assert predicted.step.peak == pytest.approx(measured - predicted.weights, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 32}, "v_proj"),  # needs masks
        ({"model_type": "gpt_neox"}, "query_key_value"),
    ],
)
def test_other_language_models_are_followed_as_well(
    changes: dict[str, Any], target: str, language_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(language_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({**LANGUAGE_MODEL, **changes}), encoding="utf-8")
    cfg = run_config(model_config(tmp_path, "minigpt_v2", lora_target_modules=[target]))
    variant, row = Variant("fp32", "as is", "none"), Row(3, PICTURE, True, False, "")
    predicted = Planner(cfg, on_gpu=False).estimate(variant, row)
    measured = probe.measure(cfg, variant, row, has_weights=False, dist=single("cpu"))
    assert predicted.step.peak == pytest.approx(measured - predicted.weights, rel=0.01)


@pytest.mark.parametrize(("arch", "samples"), [("minigpt_v2", 24), ("minigpt4", 1)])
def test_cached_vision_needs_what_its_filling_or_a_real_step_keeps_alive(
    arch: str, samples: int, language_model: Path
) -> None:
    cfg = run_config(model_config(language_model, arch, cache_vision="memory"))
    variant = Variant("fp32", "as is", "none", cached=True)
    row = Row(samples, PICTURE if arch == "minigpt_v2" else QUERIES, True, False, "")
    predicted = Planner(cfg, on_gpu=False).estimate(variant, row)
    measured = probe.measure(cfg, variant, row, has_weights=False, dist=single("cpu"))
    assert predicted.allocated - predicted.weights == pytest.approx(measured - predicted.weights, rel=0.01)
    assert (predicted.allocated == predicted.filling) == (samples == 1)  # else a step is the fullest moment


def test_on_a_gpu_cached_vision_trains_without_its_tower_and_with_features_in_half_precision(
    language_model: Path,
) -> None:
    planner = Planner(run_config(model_config(language_model, "minigpt4"), device="auto"), on_gpu=True)
    row, variant = Row(2, QUERIES, True, False, ""), Variant("bf16", "as is", "none")
    pixels, cached = (planner.estimate(replace(variant, cached=is_cached), row) for is_cached in (False, True))
    gone = {part.name for part in pixels.parts} - {part.name for part in cached.parts}
    assert gone == {"visual_encoder", "ln_vision", "Qformer"}
    assert planner.picture_bytes(variant) == 32 * 96 * 2
    # ids, positions and labels are the same; blocks of 512 bytes
    assert pixels.step.inputs - cached.step.inputs == 2 * (3 * 112 * 112 * 4 - 32 * 96 * 2)
    assert cached.filling > pixels.weights


def test_more_samples_and_less_recomputation_need_more(language_model: Path) -> None:
    planner = Planner(run_config(model_config(language_model, "minigpt_v2"), device="auto"), on_gpu=True)
    row = Row(1, PICTURE, True, False, "")
    variants = [Variant("bf16", "as is", policy) for policy in reversed(POLICIES)]
    few, many = ([planner.estimate(variant, row.with_samples(n)).total for variant in variants] for n in (1, 4))
    assert few == sorted(set(few)) and many == sorted(set(many))
    assert all(a < b for a, b in zip(few, many, strict=True))


def test_the_line_through_few_samples_leads_to_many(language_model: Path) -> None:
    planner = Planner(run_config(model_config(language_model, "minigpt_v2"), device="auto"), on_gpu=True)
    variant, row = Variant("bf16", "as is", "none"), Row(24, PICTURE, True, False, "")
    first, further = planner.line(variant, row)
    assert first + 23 * further == pytest.approx(planner.estimate(variant, row).total, rel=0.02)


def test_a_probe_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        assert probe.find_device(on_gpu=True).device.type == "cuda"
    else:
        with pytest.raises(ConfigError, match="--probe measures on a GPU, and none is usable here"):
            probe.find_device(on_gpu=True)
    assert probe.find_device(on_gpu=False).device.type == "cpu"


def test_a_probe_of_a_quantised_base_needs_its_weights(language_model: Path) -> None:
    cfg = run_config(model_config(language_model, "minigpt_v2"))
    with pytest.raises(ConfigError, match="random weights cannot be quantised"):
        probe.measure(cfg, Variant("fp32", "nf4", "none"), Row(1, PICTURE, True, False, ""), False, single("cpu"))


def test_live_memory_counts_a_storage_once_and_rounds_it() -> None:
    with LiveMemory(block=512) as memory:
        tensor = torch.ones(100)  # 400 bytes
        view = tensor[10:].view(-1)
        tensor += 1
        assert memory.alive == 512
        del tensor, view
        assert (memory.alive, memory.peak) == (0, 512)


def test_live_memory_adds_the_workspace_to_the_peak_only() -> None:
    with LiveMemory(workspace=lambda func, args, result: 1000) as memory:
        kept = torch.zeros(25)
    assert (memory.alive, memory.peak, kept.nbytes) == (100, 1100, 100)
