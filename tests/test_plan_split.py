"""What the planner says of ``run.parallel: fsdp``, against FSDP2 itself and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from minigpt4.common.dist import DistContext
from minigpt4.common.schema import RunConfig
from minigpt4.tools.planner.estimate import FRAGMENTS, Planner
from minigpt4.tools.planner.proposal import Work, propose
from minigpt4.tools.planner.skeleton import Variant, configured_variant
from minigpt4.tools.planner.split import Ranks, find_units, host_bytes, shard_size
from minigpt4.tools.planner.workload import Row, SampleShape, SetLengths, make_window
from tests.plan_parts import EVA, model_config, run_config
from tests.plan_parts import language_model as language_model
from tests.split_memory import measure_split

PICTURE = SampleShape(images=1, image_tokens=16, prompt=14, answer=40)
FULL = {"freeze_llm": False, "lora_r": 0}


@contextmanager
def ranks(count: int) -> Iterator[DistContext]:
    """A group whose other ranks are not there: nothing is sent, all is allocated."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield DistContext(0, count, 0, torch.device("cpu"))
    finally:
        distributed.destroy_process_group()


def split_over(shards: int, precision: str = "fp32", recompute: str = "none", cached: bool = False) -> Variant:
    return Variant(precision, "as is", recompute, cached, shards)


SLOW = pytest.mark.slow
CASES: dict[str, tuple[dict[str, Any], Variant, int, bool]] = {
    "LoRA": ({}, split_over(2), 2, False),
    "all of the language model in bf16, accumulated": (FULL, split_over(3, "bf16", "full"), 1, True),
    "LoRA, recomputed": ({}, split_over(2, recompute="full"), 4, True),
    "LoRA in bf16": ({}, split_over(3, "bf16"), 2, True),
    "all of the language model": (FULL, split_over(2), 1, False),
    "all, recomputed and accumulated": (FULL, split_over(2, recompute="full"), 1, True),
    "all in bf16": (FULL, split_over(2, "bf16"), 1, False),
    "everything": ({"freeze_vit": False, **FULL}, split_over(3, recompute="mlp"), 1, False),
    "cached": (FULL, split_over(2, cached=True), 1, False),
}


@pytest.mark.parametrize("name", [*list(CASES)[:2], *(pytest.param(name, marks=SLOW) for name in list(CASES)[2:])])
def test_the_prediction_is_what_fsdp2_keeps_alive(name: str, language_model: Path) -> None:
    changes, variant, samples, adds_up = CASES[name]
    cfg = run_config(model_config(language_model, "minigpt_v2", **changes), parallel="fsdp")
    row = Row(samples, PICTURE, True, adds_up, "")
    predicted = Planner(cfg, on_gpu=False, ranks=Ranks(variant.shards)).estimate(variant, row)
    with ranks(variant.shards) as dist:
        measured, weights = measure_split(cfg, variant, row, dist)
    assert predicted.weights == weights
    assert predicted.step.peak == pytest.approx(measured - weights, rel=0.01)


@SLOW
def test_copies_over_nodes_are_split_inside_one(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cfg = run_config(model_config(language_model, "minigpt_v2", **FULL), parallel="fsdp", shard_over="node")
    planner, row = Planner(cfg, on_gpu=False, ranks=Ranks(4, 2)), Row(1, PICTURE, True, False, "")
    variant = configured_variant(cfg, False, planner.ranks)
    predicted = planner.estimate(variant, row)
    with ranks(4) as dist:
        measured, weights = measure_split(cfg, variant, row, dist)
    assert (variant.shards, predicted.weights) == (2, weights)
    assert predicted.step.peak == pytest.approx(measured - weights, rel=0.01)


def _measure_one_of_two(rank: int, arguments: tuple[Any, ...], store: str, found: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found[rank] = measure_split(*arguments, DistContext(rank, 2, rank, torch.device("cpu")))
    distributed.destroy_process_group()


@SLOW
def test_ranks_that_are_there_need_as_much_as_those_that_are_not(language_model: Path, tmp_path: Path) -> None:
    cfg = run_config(model_config(language_model, "minigpt_v2", **FULL), parallel="fsdp")
    variant, row = split_over(2), Row(1, PICTURE, True, True, "")
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.spawn(
            _measure_one_of_two, ((cfg, variant, row), str(tmp_path / "store"), found), nprocs=2
        )
        sizes = dict(found)
    with ranks(2) as dist:
        assert sizes[0] == measure_split(cfg, variant, row, dist)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_shares_are_equal_and_padded() -> None:
    assert [shard_size((10, 7), shards) for shards in (1, 2, 3, 16)] == [70, 35, 28, 7]
    run = RunConfig(parallel="fsdp")
    assert [Ranks(16, 8).shards(each) for each in (run, replace(run, shard_over="node"), RunConfig())] == [16, 8, 1]
    assert Ranks(4).shards(replace(run, shard_over="node")) == 4
    assert Ranks(1).shards(run) == 1


def test_units_and_the_host_are_counted_by_hand(language_model: Path) -> None:
    cfg = run_config(model_config(language_model, "minigpt_v2", freeze_llm=False, lora_r=0), device="auto")
    planner = Planner(cfg, on_gpu=True, ranks=Ranks(8, 4))
    variant = split_over(8, "bf16")
    model = planner.skeleton(variant)
    root, *others = find_units(model, 8)
    width, hidden, words = 192, 512, 4000
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    assert [unit.gathered for unit in others[-4:]] == [2 * layer] * 4  # float32 masters travel as bf16
    assert {unit.reduced * 8 for unit in others[-4:]} == {4 * layer} and not any(u.trained for u in others[:4])
    assert root.gathered > 4 * (2 * words * width + 4 * 128 * width)  # embedding, head, projection; and norms, ...
    tower = sum(parameter.numel() for parameter in model.visual_encoder.parameters())
    rest = sum(parameter.nbytes for parameter in model.parameters()) - 2 * tower  # of a frozen tower in bf16
    assert host_bytes(model, planner.ranks) == 4 * (rest + 4 * tower)


def test_a_cache_and_fsdp_are_among_the_smallest_changes_where_they_help(
    language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt4.tools.planner.estimate.CONTEXT", 0)  # larger than all of this model
    deep = {**EVA, "depth": 24}
    cfg = run_config(model_config(language_model, "minigpt_v2", vit_config=deep, **FULL), device="auto")
    planner, row = Planner(cfg, on_gpu=True, ranks=Ranks(2)), Row(1, PICTURE, False, False, "")
    sets = [SetLengths("faces", 1, 1.0, PICTURE, PICTURE, "", None)]
    variant = configured_variant(cfg, True, planner.ranks)
    start, cached = (planner.estimate(replace(variant, cached=is_cached), row) for is_cached in (False, True))
    card = 1.001 * (1 + FRAGMENTS) * cached.total / 1.025e9
    found = {item.options: item for item in propose(planner, Work(sets, make_window(cfg, sets, 2)), start, card)}
    for changes in ({"model.cache_vision": "disk"}, {"run.parallel": "fsdp"}):
        ((key, value),) = changes.items()
        section, name = key.split(".")
        changed = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
        other = Planner(changed, on_gpu=True, ranks=Ranks(2))
        expected = other.estimate(configured_variant(changed, True, other.ranks), row)
        assert found[(f"{key}={value}",)].estimate.total == expected.total < start.total
