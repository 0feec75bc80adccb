"""A window's figures are read when the next one is queued, and nothing that a run leaves is different for it."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt4.common.checkpoint import find_last, read_checkpoint
from minigpt4.common.dist import single
from minigpt4.common.logger import read_log
from minigpt4.common.optim import optimizer_state
from minigpt4.common.types import IGNORE_INDEX, Batch
from minigpt4.runners import runner_base
from minigpt4.runners.parts import can_defer
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.tasks.base_task import BaseTask
from minigpt4.tasks.figures import NonFiniteError, StepStats
from tests.engine_parts import TASK, Bench, tiny_config
from tests.resume_harness import assert_equal

TIMES = ("_s", "_gb", "_share")


@pytest.fixture(scope="module", autouse=True)
def _without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_base, "draw_curve", lambda job_dir: None)  # most of the time of a run of this size
        yield


def test_a_gpu_reads_late_and_a_cpu_at_once() -> None:
    assert can_defer(torch.device("cuda")) and not can_defer(torch.device("cpu"))


class Emptied(torch.utils.data.Dataset[list[Batch]]):
    """Windows of a run, of which some have no target tokens."""

    def __init__(self, windows: Any, empty: set[int]) -> None:
        self._windows, self._empty = windows, empty

    def __getitem__(self, index: int) -> list[Batch]:
        rows: list[Batch] = self._windows[index]
        if index not in self._empty:
            return rows
        return [replace(row, labels=torch.full_like(row.labels, IGNORE_INDEX), num_target_tokens=0) for row in rows]


def trained(folder: Path, defer: bool, empty: set[int], **run: Any) -> tuple[RunnerBase, int]:
    """A run of 12 windows with dropout; logs after windows 1, 5, 10 and 12, saves after 4, 8 and 12."""
    settings = {"iters_per_epoch": 12, "save_every": 8, "log_freq": 10, "keep_last": 9, **run}
    runner = RunnerBase(tiny_config(folder, dropout=0.3, **settings), single("cpu"))
    runner.windows = Emptied(runner.windows, empty)  # type: ignore[assignment]
    runner.training = replace(runner.training, defer=defer)
    return runner, runner.train()


def left_by(runner: RunnerBase) -> list[Any]:
    """Everything in the job folder but times and names: log lines, and weights, moments and counters of checkpoints."""
    rows = [row for row in read_log(runner.job_dir / "log.txt") if "loss" in row]
    left: list[Any] = [{key: row[key] for key in row if not key.endswith((*TIMES, "_per_s"))} for row in rows]
    for path in sorted((runner.job_dir / "checkpoints").glob("step_*")):
        checkpoint = read_checkpoint(path)
        moments, state = checkpoint.load_resume()
        left += [path.name, checkpoint.load_weights(), moments, state, checkpoint.manifest["metrics"]]
    return left


def assert_same(left: Any, right: Any) -> None:
    """To the last bit, at any depth."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_same(value, right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> RunnerBase:
    """The run whose every window is read at once; windows 7 and 10 are skipped."""
    torch.set_num_threads(1)
    return trained(tmp_path_factory.mktemp("at_once"), False, {6, 9})[0]


def test_a_run_leaves_the_same_bits_when_figures_are_read_late(
    at_once: RunnerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late, code = trained(tmp_path, True, {6, 9})
    assert code == 0 and late.progress.skipped == 2
    assert "window 7 has no target tokens: skipped (1 so far)" in caplog.text
    expected, found = left_by(at_once), left_by(late)
    assert [row["window"] for row in found if isinstance(row, dict) and "window" in row and "epoch" in row] == [
        1,
        5,
        12,
    ]
    assert_same(found, expected)


def test_a_run_that_begins_without_target_tokens_has_the_same_moments(tmp_path: Path) -> None:
    runs = [trained(tmp_path / str(defer), defer, {0, 1}, save_every=4, max_epoch=1)[0] for defer in (False, True)]
    assert_same(left_by(runs[1]), left_by(runs[0]))


def test_loss_scaling_leaves_the_same_bits_when_figures_are_read_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that overflow, in the first windows and again after they have grown; a window is skipped in between."""
    runs, scales = [], list[float]()
    follow, backward = BaseTask._follow_gradient, BaseTask._backward

    def watched(self: BaseTask, training: Any, sums: Any) -> Any:
        figures = follow(self, training, sums)
        scales.append(training.scaler.get_scale())
        return figures

    monkeypatch.setattr(BaseTask, "_follow_gradient", watched)
    # gradients large enough for the largest scales of float32 to overflow
    monkeypatch.setattr(BaseTask, "_backward", lambda *given: backward(*given[:-1], given[-1] * 2.0**10))
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**122, growth_factor=2.0**4, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    for defer in (False, True):
        runs.append(trained(tmp_path / str(defer), defer, {6}, save_every=16)[0])
    assert scales[:12] == scales[12:]
    changes = [after / before for before, after in itertools.pairwise(scales[:12])]
    assert changes[0] == 0.5 and 2.0**4 in changes and 0.5 in changes[changes.index(2.0**4) :], changes
    assert_same(left_by(runs[1]), left_by(runs[0]))
    state = optimizer_state(runs[0].training.optimizer)
    assert 0 < float(state["head.weight"]["step"]) < 11  # or else nothing overflowed, or nothing was learned


def test_a_signal_saves_a_window_from_which_the_undisturbed_run_follows(
    at_once: RunnerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, done = BaseTask._backward, list[str]()

    def signalled(self: BaseTask, training: Any, batch: Batch, scale: Tensor) -> Tensor:
        done.append("row")
        if len(done) == 5:  # in window 3 of two rows each
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, training, batch, scale)

    monkeypatch.setattr(BaseTask, "_backward", signalled)
    stopped, code = trained(tmp_path, True, {6, 9})
    monkeypatch.undo()
    assert code == 128 + signal.SIGTERM
    assert len(done) == 8 and stopped.progress.window == 3  # window 4 was on its way and is given up
    last = find_last(stopped.job_dir)
    assert last is not None and last.step == 3 and last.can_resume
    assert [row["window"] for row in read_log(stopped.job_dir / "log.txt") if "loss" in row] == [1, 3]
    resumed, code = trained(tmp_path, True, {6, 9}, resume_ckpt_path=str(stopped.job_dir))
    assert code == 0 and resumed.job_dir == stopped.job_dir
    assert_same(resumed.model.trainable_state(), at_once.model.trainable_state())
    ours, expected = (optimizer_state(runner.training.optimizer) for runner in (resumed, at_once))
    assert_same(ours, expected)


def bits(bench: Bench) -> dict[str, Tensor]:
    """Copies of weights, moments and step counts."""
    state = optimizer_state(bench.training.optimizer)
    moments = {f"{name}/{key}": value.clone() for name, values in state.items() for key, value in values.items()}
    return {**bench.model.trainable_state(), **moments}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_none_stop_late_and_change_nothing(tmp_path: Path, what: str) -> None:
    bench, alone = Bench(tmp_path / "late", clip=1.0), Bench(tmp_path / "alone", clip=1.0)
    windows = [[bench.batch(2 * number), bench.batch(2 * number + 1)] for number in range(5)]
    for number in range(2):
        TASK.train_step(alone.training, windows[number], number)
    if what == "loss":
        windows[2][1].images[0, 0, 0, 0] = math.inf
    rows: list[str] = []

    def broken(grad: Tensor) -> Tensor:
        rows.append("row")
        return grad * math.nan if what == "gradient" and len(rows) == 5 else grad

    bench.model.mix.weight.register_hook(broken)
    seen: list[int] = []

    def after(number: int, stats: StepStats) -> bool:
        seen.append(number)
        return True

    training = replace(bench.training, defer=True)
    with pytest.raises(NonFiniteError, match="window 3: .* the weights were not changed") as caught:
        TASK.train_epoch(training, iter(windows), range(5), after, lambda number: False)
    assert len(rows) == 8 and seen == [0, 1]  # window 4 was on its way, and window 3 is named
    named = ["one/5"] if what == "loss" else ["one/4", "one/5"]
    assert f"samples on rank 0: {', '.join(named)}\n" in str(caught.value)
    folder = tmp_path / "late" / "nonfinite"
    assert json.loads((folder / "window_3_rank0.json").read_text())["samples"] == named
    saved = torch.load(folder / "window_3_rank0.pt", weights_only=True)
    assert [row["sample_ids"] for row in saved] == [["one/4"], ["one/5"]]
    assert torch.equal(saved[1]["images"], windows[2][1].images)
    assert_equal(bits(bench), bits(alone))
