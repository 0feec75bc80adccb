"""Predictions at 7B and 13B: frozen against change, and beside the figures of the published loops."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from minigpt4.models.llm import causal_lm
from minigpt4.models.minigpt4 import MiniGPT4Config
from minigpt4.models.minigpt_v2 import MiniGPTv2Config
from minigpt4.tools.planner.estimate import Planner
from minigpt4.tools.planner.reference import explanation, reference_account
from minigpt4.tools.planner.skeleton import PartBytes, Variant, language_model_files, parts_of
from minigpt4.tools.planner.workload import Row, SampleShape
from tests.plan_parts import run_config

V2 = SampleShape(images=1, image_tokens=256, prompt=31, answer=120)  # 407 positions
STAGE_1 = SampleShape(images=1, image_tokens=32, prompt=1, answer=20)
STAGE_2 = SampleShape(images=1, image_tokens=32, prompt=26, answer=160)


def total(shape: str, variant: Variant, samples: int, sample: SampleShape = V2, **model: Any) -> float:
    """Gigabytes of one GPU."""
    model_class = MiniGPTv2Config if sample is V2 else MiniGPT4Config
    cfg = run_config(model_class(llama_model="none", **model), device="auto")
    with language_model_files(cfg, shape) as known:
        return Planner(known, on_gpu=True).estimate(variant, Row(samples, sample, True, False, "")).total / 1e9


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "base", "recompute", "samples", "frozen"),
    [
        ("llama2-7b", "as is", "none", 1, 18.47),
        ("llama2-7b", "nf4", "full", 8, 8.77),
        pytest.param("llama2-7b", "as is", "none", 4, 23.49, marks=SLOW),
        pytest.param("llama2-7b", "as is", "mlp", 4, 20.87, marks=SLOW),
        pytest.param("llama2-7b", "as is", "full", 1, 17.01, marks=SLOW),
        pytest.param("llama2-7b", "as is", "full", 16, 20.03, marks=SLOW),
        pytest.param("llama2-7b", "int8", "none", 1, 12.45, marks=SLOW),
        pytest.param("llama2-7b", "int8", "full", 4, 13.53, marks=SLOW),
        pytest.param("llama2-7b", "nf4", "none", 1, 9.04, marks=SLOW),
        pytest.param("llama2-13b", "as is", "full", 4, 30.74, marks=SLOW),
        pytest.param("llama2-13b", "nf4", "none", 1, 13.76, marks=SLOW),
        pytest.param("llama2-13b", "nf4", "full", 8, 13.13, marks=SLOW),
    ],
)
def test_minigpt_v2_stays_at_its_size(shape: str, base: str, recompute: str, samples: int, frozen: float) -> None:
    assert total(shape, Variant("bf16", base, recompute), samples, lora_r=64) == pytest.approx(frozen, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "samples", "sample", "frozen"),
    [
        ("none", 64, STAGE_1, 28.79),
        ("full", 64, STAGE_1, 18.17),
        ("none", 12, STAGE_2, 25.96),
        ("full", 12, STAGE_2, 17.76),
    ],
)
def test_minigpt4_stays_at_its_size(recompute: str, samples: int, sample: SampleShape, frozen: float) -> None:
    found = total("vicuna-7b", Variant("bf16", "as is", recompute), samples, sample)
    assert found == pytest.approx(frozen, rel=0.05)


@cache
def parts_and_config(shape: str) -> tuple[list[PartBytes], Any]:
    cfg = run_config(MiniGPTv2Config(llama_model="none", lora_r=64), device="auto")
    with language_model_files(cfg, shape) as known:
        model = Planner(known, on_gpu=True).skeleton(Variant("bf16", "as is", "none"))
    return parts_of(model), causal_lm(model.llama_model).config


@pytest.mark.parametrize(
    ("kind", "shape", "samples", "published"),
    [
        ("upstream", "llama2-7b", 1, 20.7),
        ("upstream", "llama2-7b", 2, 25.0),
        ("upstream", "llama2-7b", 4, 33.0),
        ("upstream", "llama2-7b", 6, 41.0),
        ("fork", "llama2-7b", 1, 47.8),
        ("upstream", "llama2-13b", 1, 35.7),
        ("upstream", "llama2-13b", 2, 42.2),
    ],
)
def test_the_published_loops_are_found_again(kind: str, shape: str, samples: int, published: float) -> None:
    items = reference_account(kind, *parts_and_config(shape), Row(samples, V2, False, False, ""))
    assert sum(item.bytes for item in items) / 1e9 == pytest.approx(published, rel=0.05)


def test_a_shape_needs_no_files_and_has_the_published_number_of_parameters() -> None:
    counts = {part.name: part.count for part in parts_and_config("vicuna-7b")[0] if part.count}
    assert counts["llama_model"] == 6_738_423_808  # 32,001 words
    assert counts["visual_encoder"] == 986_975_872
    assert counts["LoRA"] == 33_554_432


def test_the_fork_is_explained_by_its_casts() -> None:
    assert "casts every frozen fp16 weight to fp32" in explanation("fork")
    assert "nothing is recomputed" in explanation("upstream")
