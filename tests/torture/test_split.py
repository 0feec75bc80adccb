"""A model that is split over ranks trains as a whole one does, is saved beside training, and goes on anywhere."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4 import catalog
from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError
from minigpt4.common.sharding import ranks_per_node
from minigpt4.runners.parts import build_model
from tests.resume_harness import (
    WINDOWS,
    Lab,
    Setup,
    assert_equal,
    assert_same_run,
    checks,
    last_window,
    newest,
    rows,
)

# The schedule counts micro-batches per rank, of which two ranks need half as many: a constant rate compares gradients.
STEADY = ("model.lora_dropout=0", "run.init_lr=1e-3", "run.min_lr=1e-3", "run.warmup_steps=0")
SPLIT = (*STEADY, "run.parallel=fsdp")
ALONE = ("run.accum_grad_iters=4", f"run.iters_per_epoch={2 * WINDOWS}", "run.save_every=8", "run.valid.every=16")
METRICS = "run.valid.metrics=[loss,exact_accuracy]"
TWO = Setup(2, packing="packed", options=SPLIT)
BY_FOUR = ("run.accum_grad_iters=1", f"run.iters_per_epoch={WINDOWS // 2}", "run.save_every=2", "run.valid.every=4")


def run(lab: Lab, name: str, setup: Setup, *options: str, resume: str | None = "auto") -> Path:
    """The job that training with ``setup`` made."""
    folder = lab.home / name
    lab.start(folder, setup, *options, resume=resume).done()
    return newest(folder)


@pytest.fixture(scope="module")
def killed(lab: Lab) -> tuple[Path, int, list[str]]:
    """Two ranks, of which rank 0 is killed in its save of window 4: the job, the last window of its log, checkpoints.

    Packed rows, of which ranks have different numbers, some without pictures; an uneven held-out part.
    """
    lab.start(lab.home / "split", TWO, METRICS, crash="late:4").crashed()
    job = newest(lab.home / "split")
    return job, last_window(lab.home / "split"), sorted(path.name for path in (job / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def split(lab: Lab, killed: tuple[Path, int, list[str]]) -> Path:
    """The same job after it has gone on to its end."""
    assert run(lab, "split", TWO, METRICS) == killed[0]
    return killed[0]


def assert_equal_runs(job: Path, expected: Path, first: int = 1, atol: float = 1e-6) -> None:
    """Losses from window ``first`` on, norms and final weights are those of ``expected`` but for the order of sums."""
    left, right = ([row for row in rows(path) if row["window"] >= first] for path in (job, expected))
    assert [row["window"] for row in left] == [row["window"] for row in right] == list(range(first, WINDOWS + 1))
    for row, other in zip(left, right, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=atol)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], abs=2 * atol)
        assert (row["samples"], row["target_tokens"]) == (other["samples"], other["target_tokens"])
    weights, others = (read_checkpoint(path).load_weights() for path in (job, expected))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], atol=atol, rtol=0)


def test_two_split_ranks_equal_one_rank_with_a_twofold_window(lab: Lab, split: Path) -> None:
    alone = run(lab, "alone", Setup(1, packing="packed", options=(*STEADY, *ALONE)), METRICS)
    assert_equal_runs(split, alone)
    for row, other in zip(checks(split), checks(alone), strict=True):
        assert row == pytest.approx(other, abs=1e-6)
    left, right = (read_checkpoint(path).load_resume()[0] for path in (split, alone))
    assert left.keys() == right.keys()
    for name, moments in right.items():
        for key, value in moments.items():
            torch.testing.assert_close(left[name][key], value, atol=1e-6, rtol=0)


def late(lab: Lab, name: str, setup: Setup, *options: str) -> Path:
    """The job of a run that reads its figures late between the log lines after windows 1, 5 and 8."""
    attempt = lab.start(lab.home / name, setup, "run.log_freq=10", *options, crash="late figures:0")
    attempt.done()
    assert attempt.text().count("a step without the host") == 2 * (WINDOWS - 1)
    return newest(lab.home / name)


def assert_same_end(job: Path, expected: Path) -> None:
    """The log lines there are, and the last checkpoint, are those of ``expected`` to the last bit."""
    assert rows(job) == [row for row in rows(expected) if row["window"] in (1, 5, 8)]
    left, right = read_checkpoint(job), read_checkpoint(expected)
    assert_equal(left.load_weights(), right.load_weights())
    (moments, state), (expected_moments, expected_state) = left.load_resume(), right.load_resume()
    assert moments.keys() == expected_moments.keys() and state == expected_state
    for name, values in expected_moments.items():
        assert_equal(moments[name], values)


def test_split_ranks_that_read_their_figures_late_leave_the_same_bits(lab: Lab, split: Path) -> None:
    assert_same_end(late(lab, "late", TWO, METRICS), split)


@pytest.mark.slow
def test_loss_scaling_of_split_ranks_leaves_the_same_bits_when_figures_are_read_late(lab: Lab) -> None:
    at_once = run(lab, "fp16_at_once", TWO, "run.precision=fp16")
    assert_same_end(late(lab, "fp16_late", TWO, "run.precision=fp16"), at_once)


def test_a_split_checkpoint_is_one_file_of_weights_and_a_part_of_the_moments_per_rank(split: Path) -> None:
    checkpoint = read_checkpoint(split, check_content=True)
    assert sorted(name.split("-model")[0] for name in checkpoint.manifest["files"]) == [
        "config.yaml", "model.safetensors", "resume/shards/shard-00001", "resume/shards/shard-00002",
        "resume/state.json",
    ]  # fmt: skip
    sizes = [size for name, size in checkpoint.manifest["files"].items() if "shards" in name]
    assert max(sizes) < 1.2 * min(sizes)


def test_training_goes_on_beside_a_save_and_its_kill_leaves_nothing_under_a_final_name(
    killed: tuple[Path, int, list[str]], split: Path
) -> None:
    _, last, names = killed
    assert last >= 5
    draft, *others = names
    assert draft.startswith(".writing_step_4_") and "step_4" not in others and "step_2" in others
    assert read_checkpoint(split).step == WINDOWS and not list(split.glob("checkpoints/.*"))


def test_a_split_checkpoint_goes_on_with_one_rank(lab: Lab, split: Path) -> None:
    options = (*STEADY, *ALONE, "run.parallel=ddp")
    alone = run(lab, "by_one", Setup(1, packing="packed", options=options), resume=str(split / "checkpoints/step_6"))
    assert_equal_runs(alone, split, first=7)


@pytest.mark.slow
def test_a_split_checkpoint_goes_on_with_four_ranks_of_two_nodes(lab: Lab, split: Path) -> None:
    setup = Setup(4, packing="packed", options=(*SPLIT, *BY_FOUR, "run.shard_over=node"), per_node=2)
    four = run(lab, "by_four", setup, resume=str(split / "checkpoints/step_6"))
    assert_equal_runs(four, split, first=7)


@pytest.mark.slow
def test_a_whole_checkpoint_goes_on_with_split_ranks(lab: Lab, split: Path) -> None:
    whole = run(lab, "whole", Setup(2, packing="packed", options=STEADY))
    assert_equal_runs(run(lab, "onward", TWO, resume=str(whole / "checkpoints/step_6")), whole, first=7)


@pytest.mark.slow
def test_after_a_kill_split_ranks_repeat_every_bit(lab: Lab) -> None:
    setup = Setup(2, options=("run.parallel=fsdp",))  # with dropout and a schedule
    undisturbed = run(lab, "undisturbed", setup)
    folder = lab.home / "repeated"
    lab.start(folder, setup, crash="row:6").crashed()
    lab.start(folder, setup).done()
    assert_same_run(newest(folder), undisturbed)


@pytest.mark.slow
def test_a_disk_that_fills_up_beside_training_ends_split_ranks_and_gets_its_room_back(lab: Lab) -> None:
    attempt = lab.start(lab.home / "full", TWO, crash="full:4")
    assert attempt.finish() == [2, 2]
    assert "cannot write" in attempt.text() and "the file grew beyond the limit" in attempt.text()
    left = [path.name for path in newest(lab.home / "full").glob("checkpoints/*")]
    assert sorted(left) == ["last", "step_2"] and not list(newest(lab.home / "full").glob("checkpoints/.*"))


@pytest.mark.slow
def test_a_signal_saves_beside_training_and_waits_for_it(lab: Lab) -> None:
    attempt = lab.start(lab.home / "signal", TWO)
    attempt.kill_rank_after(3, 1, signal.SIGTERM)
    assert attempt.finish() == [128 + signal.SIGTERM] * 2
    job = newest(lab.home / "signal")
    assert read_checkpoint(job, check_content=True).step == last_window(lab.home / "signal") < WINDOWS


VARIANTS = {
    "full": ("model.freeze_llm=False", "model.lora_r=0"),
    "projection alone": ("model.lora_r=0",),
    "layers computed twice": ("run.recompute=full",),
    "MLPs computed twice": ("run.recompute=mlp",),
    "everything trains": ("model.freeze_vit=False", "model.freeze_llm=False", "run.recompute=full"),
    "cached vision": ("model.cache_vision=memory",),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_split_ranks_equal_whole_ones(lab: Lab, variant: str) -> None:
    name = variant.replace(" ", "_")
    whole = run(lab, f"{name}_ddp", Setup(2, packing="packed", options=STEADY), *VARIANTS[variant])
    split = run(lab, f"{name}_fsdp", TWO, *VARIANTS[variant])
    assert_equal_runs(split, whole)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_split_ranks_equal_whole_ones_in_half_precision_until_roundings_part(lab: Lab, precision: str) -> None:
    option = f"run.precision={precision}"
    whole = run(lab, f"{precision}_ddp", Setup(2, options=STEADY), option)
    split = run(lab, f"{precision}_fsdp", Setup(2, options=SPLIT), option)
    for row, other in list(zip(rows(split), rows(whole), strict=True))[:4]:
        assert row["loss"] == pytest.approx(other["loss"], abs=2e-4)


def written(lab: Lab, *options: str) -> Any:
    catalog.load()
    return load_config(lab.home / "proof.yaml", options)


@pytest.mark.parametrize("key", ["low_resource", "load_in_4bit"])
def test_quantised_weights_are_refused_before_anything_is_loaded(lab: Lab, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"run.parallel: fsdp cannot split .* model.{key}; .* or parallel to ddp"):
        written(lab, "run.parallel=fsdp", f"model.{key}=True")


def test_shard_over_without_fsdp_is_refused(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="shard_over node needs parallel: fsdp"):
        written(lab, "run.shard_over=node")


def test_the_ranks_of_a_node_come_from_torchrun_then_srun() -> None:
    assert ranks_per_node({"LOCAL_WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 16) == 4
    assert ranks_per_node({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 16) == 8
    for env in ({}, {"SLURM_STEP_TASKS_PER_NODE": "8,4"}, {"LOCAL_WORLD_SIZE": "3"}):
        with pytest.raises(ConfigError, match="run.shard_over node"):
            ranks_per_node(env, 16)


def test_a_row_without_pictures_gives_gradients_of_zero_to_all_of_a_tower_that_trains(lab: Lab) -> None:
    cfg = written(lab, "model.freeze_vit=False")
    model = build_model(cfg, torch.device("cpu"), torch.float32).train()
    ids = torch.tensor([[1, 5, 6, 7]])
    model.embed(ids, torch.zeros(0, 3, 1, 1), 0).sum().backward()
    trained = [parameter for parameter in model.visual_encoder.parameters() if parameter.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)
