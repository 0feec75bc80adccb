"""The benchmark is fair: its baseline is the reference, both sides compute one loss, and bytes are counted right."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import train_step
from benchmarks.reference_loop import ReferenceLoop
from minigpt4.common.types import IGNORE_INDEX, Sample, Turn
from minigpt4.datasets.collate import collate_packed, collate_padded
from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config
from minigpt4.models.weights import canonical_name
from minigpt4.tools.live_memory import LiveMemory
from tests.golden_cases import build_model, load_case

CASE = "c_minigptv2_lora_instruction"
WORKLOAD = Path(train_step.__file__).parent / "workload"
MEBI = 1 << 20


def workload_samples(count: int) -> list[list[dict[str, Any]]]:
    return json.loads((WORKLOAD / "samples.json").read_text())[:count]


def loss_of(loop: ReferenceLoop, batch: list[dict[str, Any]], images: Tensor) -> Tensor:
    return loop.loss(images, [s["instruction_input"] for s in batch], [s["answer"] for s in batch])


def as_samples(batch: list[dict[str, Any]], images: Tensor) -> list[Sample]:
    turns = [(Turn(s["instruction_input"], s["answer"]),) for s in batch]
    return [Sample(turn, (image,), "") for turn, image in zip(turns, images, strict=True)]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_baseline_gives_the_reference_s_mask_targets_loss_and_gradients(recompute: bool) -> None:
    case = load_case(CASE)
    model = build_model(case, lora_dropout=0.0).train()
    assert isinstance(model, MiniGPTv2)
    loop = ReferenceLoop(model, recompute)
    texts, image = case.meta["samples"], case.tensor("image")
    embeddings, mask, targets = loop.inputs(image, texts["instruction_input"], texts["answer"])
    assert embeddings.shape == (3, 83, 64)  # as recorded in the reference's run
    assert torch.equal(mask, case.tensor("attention_mask").long())
    assert torch.equal(targets, case.tensor("targets").long())
    loss = loop.loss(image, texts["instruction_input"], texts["answer"])
    assert loss.item() == pytest.approx(case.meta["loss_mean"], abs=1e-5)
    loss.backward()
    expected = {canonical_name(name): grad for name, grad in case.tensors("grads").items()}
    named = [(f"llama_model.base_model.model.{name}", p) for name, p in loop.lm.named_parameters() if p.requires_grad]
    named += [("llama_proj.weight", model.llama_proj.weight), ("llama_proj.bias", model.llama_proj.bias)]
    assert {canonical_name(name) for name, _ in named} == set(expected)
    for name, parameter in named:
        grad = expected[canonical_name(name)]
        assert parameter.grad is not None
        assert (parameter.grad - grad).norm() / grad.norm() < 1e-4, name


def test_the_baseline_runs_the_libraries_own_layers() -> None:
    model = build_model(load_case(CASE))
    assert isinstance(model, MiniGPTv2)
    loop = ReferenceLoop(model)
    own = [type(m) for m in loop.lm.modules() if any(b.__module__.startswith("minigpt4") for b in type(m).__mro__)]
    assert own == []
    assert loop.lm.config._attn_implementation == "eager" and loop.lm.config.use_cache
    assert not any(getattr(module, "fused_attn", False) for module in model.visual_encoder.modules())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("is_packed", [True, False])
def test_both_sides_of_the_benchmark_compute_the_same_loss(is_packed: bool, recompute: bool) -> None:
    case = load_case(CASE)
    model = build_model(case, lora_dropout=0.0, use_grad_checkpoint_llm=recompute).train()
    assert isinstance(model, MiniGPTv2)
    images = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    for batch in workload_samples(2):
        samples = as_samples(batch, images)
        rows = (
            collate_packed(samples, model.encoder, 1 << 14) if is_packed else [collate_padded(samples, model.encoder)]
        )
        ours = sum(float(model(row).loss_sum.detach()) for row in rows) / sum(row.num_target_tokens for row in rows)
        reference = loss_of(ReferenceLoop(model), batch, images).item()
        assert ours == pytest.approx(reference, abs=1e-5)


def test_the_baseline_pads_as_much_as_the_published_reference(tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=32000, **tiny)).save_pretrained(tmp_path)
    for path in WORKLOAD.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / path.name)
    cfg = MiniGPTv2Config(
        image_size=224,
        vit_model="eva",
        vit_weights="random",
        vit_config={"patch_size": 14, "embed_dim": 8, "depth": 1, "num_heads": 1},
        llama_model=str(tmp_path),
        lora_r=1,
        chat_template=True,
        end_sym="</s>",
        max_txt_len=1024,
    )
    model = MiniGPTv2.from_config(cfg, torch.device("cpu"), torch.float32)
    loop, images = ReferenceLoop(model), torch.zeros(4, 3, 224, 224)
    padded = real = supervised = 0
    ours_real = ours_supervised = 0
    for batch in workload_samples(16):
        texts = [s["instruction_input"] for s in batch]
        _, mask, targets = loop.inputs(images, texts, [s["answer"] for s in batch])
        padded, real = padded + mask.numel(), real + int(mask.sum())
        supervised += int((targets != IGNORE_INDEX).sum())
        (row,) = collate_packed(as_samples(batch, images), model.encoder, 4096)
        ours_real, ours_supervised = ours_real + sum(row.lengths), ours_supervised + row.num_target_tokens
    assert (padded, real, supervised) == (17112, 12433, 4920)  # counted in the published reference's own run
    assert (ours_real, ours_supervised) == (real, supervised)


def test_live_memory_counts_a_storage_once_until_its_last_view_is_gone() -> None:
    with LiveMemory() as memory:
        first = torch.zeros(MEBI // 4)
        view = first.view(2, -1)[0]
        first.add_(1)
        assert memory.alive == memory.peak == MEBI
        del first
        assert memory.alive == MEBI
        del view
        assert memory.alive == 0
        second, third = torch.zeros(MEBI), torch.zeros(MEBI // 4)
        assert memory.alive == memory.peak == 5 * MEBI
        del second, third
    assert (memory.alive, memory.peak) == (0, 5 * MEBI)


def test_live_memory_counts_what_only_the_graph_holds_and_gradients() -> None:
    weight = torch.zeros(MEBI // 4, requires_grad=True)  # older than the mode: not counted
    with LiveMemory() as memory:
        loss = weight.exp().sum()  # exp keeps its result for the backward
        assert memory.alive == MEBI + 4
        loss.backward()
        assert memory.alive == MEBI + 4  # the graph is gone, the gradient is there
        weight.grad = None
        assert memory.alive == 4
        assert memory.peak == 2 * MEBI + 8  # result and gradient, the loss and its own gradient


def test_live_memory_sees_that_recomputed_layers_keep_nothing() -> None:
    weight = torch.zeros(MEBI // 4, requires_grad=True)

    def layers(x: Tensor) -> Tensor:
        return x.exp().exp().exp().sum()

    held = []
    for forward in (layers, lambda x: checkpoint(layers, x, use_reentrant=False)):
        with LiveMemory() as memory:
            loss = forward(weight)
            held.append(memory.alive)
            loss.backward()
        weight.grad = None
    assert held == [3 * MEBI + 4, 4]


def allocator_peak(step: Callable[[], Any]) -> int:
    """Most bytes in use at once according to the allocator's own record of ``step``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("side", ["ours", "reference"])
def test_live_memory_agrees_with_the_allocator_s_own_record(side: str) -> None:
    model = build_model(load_case(CASE), lora_dropout=0.0).train()
    assert isinstance(model, MiniGPTv2)
    batch, images = workload_samples(1)[0], torch.zeros(4, 3, 112, 112)
    (row,) = collate_packed(as_samples(batch, images), model.encoder, 1 << 14)
    loop = ReferenceLoop(model)

    def step() -> None:
        loss = model(row).loss_sum if side == "ours" else loss_of(loop, batch, images)
        loss.backward()

    step()
    peaks = []
    for measure in (count_live, allocator_peak):
        for parameter in (*model.parameters(), *loop.parameters):
            parameter.grad = None
        peaks.append(measure(step))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.03)


def count_live(step: Callable[[], Any]) -> int:
    with LiveMemory() as memory:
        step()
    return memory.peak


def runs(losses: list[float]) -> dict[str, list[dict[str, Any]]]:
    figures = {"gradient_norm": 1.0, "product_s": 0.034, "rss_bytes": 1, "live_bytes": 1000, "losses": [10.0, 11.0]}
    seconds = {"reference": 5.0, "ours": 2.0, "recompute": 3.0, "cached": 1.5, "reference_recompute": 6.0}
    table = {name: [{**figures, "cpu_s": value}] for name, value in seconds.items()}
    table["ours"][0].update(losses=losses, live_bytes=200)
    return table


def test_no_figure_is_given_when_the_losses_differ() -> None:
    with pytest.raises(SystemExit, match=re.escape("losses differ by 2.0e-05")):
        train_step.summarise(runs([10.0, 11.00002]))


def test_ratios_are_ours_over_the_reference_s() -> None:
    figures = train_step.summarise(runs([10.0, 11.000001]))
    assert figures["time_ratio"] == pytest.approx(0.4)
    assert figures["extra_memory_ratio"] == pytest.approx(0.2)
    assert figures["against_published"] == pytest.approx(2.0 / 5.05)
    assert set(train_step.GATES) <= set(figures)
