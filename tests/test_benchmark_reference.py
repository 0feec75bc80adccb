"""What the benchmark compares against computes what it says, and its memory count counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from reference_loop import ReferenceLoop  # noqa: E402

from minigpt4.common.types import Sample, Turn  # noqa: E402
from minigpt4.datasets.collate import collate_packed  # noqa: E402
from minigpt4.models.generation import GenerationMixin  # noqa: E402
from minigpt4.tools.live_memory import LiveMemory  # noqa: E402
from tests.golden_cases import build_model, images_of, load_case  # noqa: E402


def test_the_reference_style_loop_has_the_recorded_loss() -> None:
    case = load_case("c_minigptv2_lora_instruction")
    model = build_model(case)
    assert isinstance(model, GenerationMixin)
    samples = case.meta["samples"]
    loss = ReferenceLoop(model).loss(images_of(case), samples["instruction_input"], samples["answer"])
    assert loss.item() == pytest.approx(case.meta["loss_mean"], abs=1e-5)


def test_both_loops_have_the_same_loss_and_gradients() -> None:
    case = load_case("c_minigptv2_lora_instruction")
    samples, images = case.meta["samples"], images_of(case)
    texts = list(zip(samples["instruction_input"], samples["answer"], strict=True))
    ours, theirs = build_model(case), build_model(case)
    assert isinstance(theirs, GenerationMixin)
    rows = collate_packed(
        [Sample((Turn(*text),), (image,), "x") for text, image in zip(texts, images, strict=True)], ours.encoder, 4096
    )
    (ours(rows[0]).loss_sum / rows[0].num_target_tokens).backward()
    loss = ReferenceLoop(theirs).loss(images, samples["instruction_input"], samples["answer"])
    loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-4)


def test_live_memory_counts_what_is_alive_at_once() -> None:
    before = torch.zeros(1000)
    with LiveMemory() as memory:
        first = torch.zeros(1000)  # 4,000 bytes
        view = first[10:]
        del first, view
        second, third = torch.zeros(500), before + 1  # 2,000 and 4,000 bytes
        assert memory.alive == 6000
        second.add_(1)
        del second, third
    assert (memory.alive, memory.peak) == (0, 6000)
