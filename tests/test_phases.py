"""Time and memory by phase, and that nobody waits for the device to learn them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt4.common.dist import DistContext, single
from minigpt4.common.logger import read_log
from minigpt4.common.optim import build_optimizer
from minigpt4.common.schema import RunConfig
from minigpt4.datasets.collate import collate_packed
from minigpt4.runners.parts import watch_phases
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.tasks.base_task import BaseTask, Training
from minigpt4.tasks.figures import StepStats
from minigpt4.tasks.image_text_pretrain import ImageTextPretrainTask
from minigpt4.tasks.phases import PHASES, PhaseClock
from tests.engine_parts import tiny_config
from tests.golden_cases import build_model, load_case
from tests.test_benchmark_reference import as_samples, workload_samples

CASE = "c_minigptv2_lora_instruction"


def training_of(folder: Path, device: str = "cpu", is_scaled: bool = False) -> tuple[Training, list[Any]]:
    """A model with LoRA, and a window of two rows; ``is_scaled``: the loss, as in fp16."""
    dist = single(device)
    model = build_model(load_case(CASE), lora_dropout=0.1).train().to(dist.device)
    batches = [
        collate_packed(as_samples(batch, torch.zeros(4, 3, 112, 112)), model.encoder, 1 << 14)[0]
        for batch in workload_samples(2)
    ]
    optimizer = build_optimizer(model.trainable_parameters_by_name(), RunConfig(), dist.device)
    training = Training(
        model=model, core=model, optimizer=optimizer,
        scaler=torch.amp.GradScaler(dist.device.type, enabled=is_scaled, init_scale=2.0**8, growth_interval=2),
        lr_at=lambda _: 1e-4, dist=dist, accumulation=2, clip_grad_norm=1.0, seed=0, job_dir=folder,
        stop_requested=lambda: False, clock=watch_phases(model, dist),
    )  # fmt: skip
    return training, batches


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_every_second_of_a_step_belongs_to_a_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, window = training_of(tmp_path)
    task, work = ImageTextPretrainTask(), Waits()
    # a clock that the work itself drives: an operation takes a second, and nothing else takes any
    monkeypatch.setattr(time, "perf_counter", lambda: float(work.counts.total()))
    with work:
        for number in range(2):
            task.train_step(training, window, number)
    taken = training.clock.take(2)
    assert list(taken) == [f"{phase}_s" for phase in PHASES] + [f"{phase}_gb" for phase in PHASES]
    assert all(taken[f"{phase}_s"] > 0 and taken[f"{phase}_gb"] == 0 for phase in PHASES)
    elapsed = work.counts.total() / 2
    outside = elapsed - sum(taken[f"{phase}_s"] for phase in PHASES)
    assert 0 <= outside < 0.01 * elapsed  # what is done once per window: counts over ranks, the scale
    assert sum(training.clock.take(1).values()) == 0


def test_generation_and_validation_are_no_phases(tmp_path: Path) -> None:
    training, window = training_of(tmp_path)
    task = ImageTextPretrainTask()
    task.train_step(training, window, 0)
    before = training.clock.take(1)
    task.validate(training, window)
    assert before["vision_s"] > 0 and training.clock.take(1)["vision_s"] == 0


def test_a_step_that_is_dropped_or_has_not_ended_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    clock = PhaseClock(torch.device("cpu"))

    def begun() -> None:
        clock.start()
        clock.mark("backward")

    begun()
    clock.mark("optimizer")
    clock.stop()
    begun()
    assert clock.take(1)["backward_s"] == 1
    clock.mark("optimizer")
    clock.stop()
    begun()
    clock.drop()
    clock.mark("optimizer")  # stands still
    taken = clock.take(1)
    assert (taken["backward_s"], taken["optimizer_s"]) == (1, 1)


def test_the_clock_of_a_rank_that_nobody_asks_keeps_nothing(tmp_path: Path) -> None:
    training, window = training_of(tmp_path)
    clock = watch_phases(build_model(load_case(CASE)), DistContext(1, 2, 0, torch.device("cpu")))
    ImageTextPretrainTask().train_step(replace(training, clock=clock), window, 0)
    assert clock._marks == []


class Queue:
    """A GPU whose every event takes a second and whose every phase needs what ``peaks`` says."""

    def __init__(self, peaks: list[int]) -> None:
        self.peaks, self.now, self.waits = peaks, 0, 0

    def event(self, enable_timing: bool) -> Any:
        queue = self

        class Event:
            def record(self) -> None:
                queue.now += 1
                self.at = queue.now

            def synchronize(self) -> None:
                queue.waits += 1

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at) * 1000

        return Event()


def test_on_a_gpu_events_are_read_when_they_are_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue([9, 1, 5, 7, 2, 4, 3, 3])
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: queue.peaks.pop(0) << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    clock = PhaseClock(torch.device("cuda"))
    clock.mark("vision")  # stands still: not counted
    clock.start()  # 9 before the step
    for phase in ("vision", "language", "backward"):
        clock.mark(phase)
    clock.start()
    clock.mark("backward")
    clock.mark("optimizer")
    clock.stop()
    assert queue.waits == 0
    taken = clock.take(1)
    assert queue.waits == 1
    assert taken == {
        "vision_s": 1, "language_s": 1, "backward_s": 2, "optimizer_s": 1,
        "vision_gb": 1, "language_gb": 5, "backward_gb": 7, "optimizer_gb": 3,
    }  # fmt: skip
    assert clock.highest() == 9 << 30


WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "unique_dim",
    "_unique2",
    "is_nonzero",
    "equal",
)
"""Operations whose result, or its size, the host cannot go on without. ``_local_scalar_dense`` reads one value."""


READING = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__}


class Reads(TorchFunctionMode):
    """Notes when Python asks a tensor for its values; of a tensor in host memory that is no operation."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self._events.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_scaled", [False, True])
def test_a_window_is_read_when_the_next_one_is_queued_and_nothing_else_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_scaled: bool
) -> None:
    training, window = training_of(tmp_path, is_scaled=is_scaled)
    training, events, queue_gradient = replace(training, defer=True), list[str](), BaseTask._queue_gradient

    def queued(*arguments: Any) -> Any:
        sums = queue_gradient(*arguments)
        events.append(f"queued {sums.number}")
        return sums

    def after(number: int, stats: StepStats) -> bool:
        events.append(f"after {number}")
        if number == 0:
            training.clock.take(1)
        return True

    monkeypatch.setattr(BaseTask, "_queue_gradient", queued)
    assert any(len(batch.images) for batch in window)
    with Waits() as waits, Reads(events):
        ImageTextPretrainTask().train_epoch(training, iter([window] * 4), range(4), after, lambda number: number == 0)
    assert waits.counts["aten.mm.default"] > 0
    assert {name: n for name, n in waits.counts.items() if name.split(".")[1] in WAITING} == {}
    # the one reading per window is that of figures which have been copied meanwhile
    assert events == [
        *("queued 0", "tolist", "after 0"),
        "queued 1",
        *("queued 2", "tolist", "after 1"),
        *("queued 3", "tolist", "after 2"),
        *("tolist", "after 3"),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_scaled", [False, True])
def test_on_a_gpu_nothing_waits_between_log_lines_and_losses_stay(tmp_path: Path, is_scaled: bool) -> None:
    losses: list[float] = []

    def after(number: int, stats: StepStats) -> bool:
        losses.append(stats.loss)
        torch.cuda.set_sync_debug_mode("error" if training.defer else "default")
        return True

    for defer in (True, False):
        training, rows = training_of(tmp_path, "cuda", is_scaled)
        training, window = replace(training, defer=defer), [batch.copied(training.dist.device) for batch in rows]
        torch.cuda.synchronize()
        try:
            task = ImageTextPretrainTask()
            task.train_epoch(training, iter([window] * 6), range(6), after, lambda number: number == 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert losses[:6] == pytest.approx(losses[6:], rel=1e-4)


def test_log_txt_says_where_time_went(tmp_path: Path) -> None:
    runner = RunnerBase(tiny_config(tmp_path), single("cpu"))
    assert runner.train() == 0
    rows = [row for row in read_log(runner.job_dir / "log.txt") if "loss" in row]
    assert rows
    for row in rows:
        parts = [row[f"{name}_s"] for name in ("wait", "language", "backward", "optimizer")]
        assert all(part > 0 for part in parts) and row["vision_s"] == 0  # this model has no decoder that tells
        assert row["backward_gb"] == 0
