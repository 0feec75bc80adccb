"""Two ranks see what one rank with a twofold window sees, and stop together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.common.checkpoint import find_last, read_checkpoint
from minigpt4.common.dist import _first_node, _place, init, single
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import read_log
from minigpt4.common.schema import RunConfig
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import tiny_config
from tests.resume_harness import assert_equal

ROOT = Path(__file__).resolve().parents[1]
# the schedule counts micro-batches per rank, of which two ranks need half: a constant rate compares the gradients
METRICS = ["loss", "exact_accuracy"]
CONSTANT: dict[str, Any] = {"min_lr": 1e-2, "warmup_steps": 0, "with_val": True}


def _job(folder: Path) -> Path:
    (job,) = (folder / "tiny").iterdir()
    return job


def _environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets for one of two processes on this machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """Folder and exit codes of a run on two ranks; rank 1 gets a SIGTERM in window 7 of 8."""
    folder = tmp_path_factory.mktemp("two")
    counts = {"accum_grad_iters": 2, "iters_per_epoch": 8, "valid": {"every": 8, "metrics": METRICS}}
    again = {"folder": str(folder / "late"), "settings": {"log_freq": 100}}
    settings = json.dumps({**CONSTANT, **counts, "uneven": True, "term_at": 6, "again": again})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.engine_child", str(folder), settings]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=_environment(rank, port)) for rank in (0, 1)]
    try:
        return folder, [process.wait(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("one")
    valid = {"every": 16, "metrics": METRICS}
    cfg = tiny_config(folder, **CONSTANT, accum_grad_iters=4, iters_per_epoch=16, max_epoch=2, valid=valid)
    runner = RunnerBase(cfg, single("cpu"))
    runner.plan = type(runner.plan)(4, 7, 1)  # the seven windows that the two ranks get to
    assert runner.train() == 0
    yield folder


def test_two_ranks_equal_one_rank_with_twofold_accumulation(two_ranks: tuple[Path, list[int]], one_rank: Path) -> None:
    both, alone = _job(two_ranks[0]), _job(one_rank)
    left = {row["window"]: row for row in read_log(both / "log.txt") if "loss" in row}
    right = {row["window"]: row for row in read_log(alone / "log.txt") if "loss" in row}
    assert sorted(left) == sorted(right) == list(range(1, 8))
    for window, row in left.items():
        assert row["loss"] == pytest.approx(right[window]["loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(right[window]["grad_norm"], abs=1e-6)
        for key in ("samples", "target_tokens"):
            assert row[key] == right[window][key]
    weights, expected = read_checkpoint(both).load_weights(), read_checkpoint(alone).load_weights()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


def test_validation_is_shared_and_complete(two_ranks: tuple[Path, list[int]], one_rank: Path) -> None:
    events = [read_log(_job(folder) / "log.txt") for folder in (two_ranks[0], one_rank)]
    both, alone = (next(row for row in rows if row.get("event") == "validation") for rows in events)
    assert both["window"] == alone["window"] == 4
    for name in ("val_loss", "val_exact_accuracy"):
        assert both[name] == pytest.approx(alone[name], abs=1e-5)
    both, alone = (next(row for row in rows if row.get("event") == "canaries") for rows in events)
    assert both == alone and len(both["answers"]) == 2
    assert read_checkpoint(_job(two_ranks[0])).manifest["world_size"] == 2


def test_a_signal_to_one_rank_stops_all_after_the_same_window(two_ranks: tuple[Path, list[int]]) -> None:
    folder, codes = two_ranks
    assert codes == [128 + signal.SIGTERM] * 2
    checkpoint = find_last(_job(folder))
    assert checkpoint is not None and checkpoint.step == 7 and checkpoint.can_resume


def test_two_ranks_that_read_figures_late_leave_the_same_and_stop_after_the_same_window(
    two_ranks: tuple[Path, list[int]],
) -> None:
    at_once, late = _job(two_ranks[0]), _job(two_ranks[0] / "late")
    expected = {row["window"]: row for row in read_log(at_once / "log.txt") if "loss" in row}
    found = {row["window"]: row for row in read_log(late / "log.txt") if "loss" in row}
    assert list(found) == [1, 7]  # what is not logged is read late; the signal came in window 7
    for window, row in found.items():
        for key in ("loss", "lr", "grad_norm", "samples", "target_tokens"):
            assert row[key] == expected[window][key]
    for step in ("step_4", "step_7"):
        ours, others = (read_checkpoint(job / "checkpoints" / step) for job in (late, at_once))
        assert_equal(ours.load_weights(), others.load_weights())
        (moments, state), (other_moments, other_state) = ours.load_resume(), others.load_resume()
        assert state == other_state and moments.keys() == other_moments.keys()
        for name, values in moments.items():
            assert_equal(values, other_moments[name])


def test_place_comes_from_torchrun_then_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "kept")
    monkeypatch.setenv("MASTER_PORT", "1")
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12"}
    assert _place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **slurm}) == (3, 4, 1)
    assert _place(slurm) == (5, 8, 1)
    # a batch script that starts python itself is one process, whatever the job asked for
    assert _place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1, 0)
    assert _place({}) == (0, 1, 0)


def test_the_first_node_of_a_slurm_list() -> None:
    assert _first_node({"SLURM_STEP_NODELIST": "node[03-07,09],other1"}) == "node03"
    assert _first_node({"SLURM_JOB_NODELIST": "gpu-a1,gpu-a2"}) == "gpu-a1"


def test_several_processes_without_distributed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="run.distributed is False, but 2 processes"):
        init(RunConfig(distributed=False))


@pytest.mark.parametrize("device", ["gpu", "tpu:0"])
def test_an_unknown_device_names_the_known_ones(device: str) -> None:
    with pytest.raises(ConfigError, match="auto, cuda or cpu"):
        init(RunConfig(device=device))
