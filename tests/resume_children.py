"""What the processes of ``tests.resume_harness`` do: train as one rank, die where they are told to, save, make folders.

Everything here is imported by the fork server, so it starts at once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minigpt4 import catalog
from minigpt4.cli import train_command
from minigpt4.common import checkpoint
from minigpt4.common.dist import single
from minigpt4.runners import runner_base
from minigpt4.runners.job import create_job_dir
from minigpt4.tasks.base_task import BaseTask
from tests.engine_parts import tiny_config
from tests.torture.faults import FAULTS

_LATE_S = 60
"""A thread that is to kill its process does so long before."""

catalog.load()


def lead(function: Callable[..., None], *arguments: Any) -> None:
    """``function`` in a process group of its own, which is how its loader workers are found later."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader workers; a fork server's child has its own way
    function(*arguments)


def rank(rank: int, world_size: int, command: list[str], crash: str, output: str, per_node: int = 0) -> None:
    """One rank of ``train.py``; a process of the fork server."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if per_node:
        os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    torch.set_num_threads(1)
    runner_base.draw_curve = lambda job_dir: None  # half a second of matplotlib per checkpoint proves nothing
    if crash:
        place, window = crash.split(":")
        if place in FAULTS:
            FAULTS[place](rank, int(window))
        else:
            _crash_at(place, int(window))
    sys.exit(train_command(command))


def _crash_at(place: str, window: int) -> None:
    """SIGKILL to this process: in the middle of ``window`` (place row), after it (after), in its save (save).

    late: in its save, which waits in its thread until training has gone on by a window.
    """
    runner = runner_base.RunnerBase
    queue_gradient, backward = BaseTask._queue_gradient, BaseTask._backward
    after_window, write_files = runner._after_window, checkpoint._write_files
    place_now = [0, 0]  # window, rows done in it
    next_is_done = threading.Event()

    def die(here: str, number: int) -> None:
        if here == place and number == window:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self: Any, training: Any, rows: Any, number: int, *others: Any) -> Any:
        place_now[:] = [number + 1, 0]
        return queue_gradient(self, training, rows, number, *others)

    def row(*arguments: Any) -> Any:
        result = backward(*arguments)
        place_now[1] += 1
        if place_now[1] == 2:
            die("row", place_now[0])
        return result

    def after(self: Any, number: int, stats: Any) -> bool:
        goes_on = after_window(self, number, stats)
        die("after", number + 1)
        if number == window:
            next_is_done.set()
            time.sleep(_LATE_S if place == "late" else 0)
        return goes_on

    def write(draft: Path, *arguments: Any) -> None:
        write_files(draft, *arguments)
        number = int(draft.name.split("_")[2])
        die("save", number)
        if (place, number) == ("late", window) and next_is_done.wait(_LATE_S):
            die("late", number)

    for owner, name, function in (
        (BaseTask, "_queue_gradient", step),
        (BaseTask, "_backward", row),
        (runner, "_after_window", after),
        (checkpoint, "_write_files", write),
    ):
        setattr(owner, name, function)


def make_job_dir(root: Path, start_at: float) -> None:
    """For ``Lab.process``: a job folder made at a given time, as several runs of one second make theirs."""
    cfg, context = tiny_config(root), single("cpu")
    time.sleep(max(0.0, start_at - time.time()))
    (create_job_dir(cfg, context) / "mine").touch(exist_ok=False)


def save_step(job: Path, step: int, is_best: bool = False) -> None:
    """A checkpoint of a few numbers."""
    checkpoint.save_checkpoint(
        job / "checkpoints",
        step,
        weights={"a": torch.full((2,), float(step))},
        config_text="run: {}\n",
        manifest={},
        resume={"optimizer": {"a": {"exp_avg": torch.zeros(2)}}, "state": {"window": step}},
        keep_last=2,
        is_best=is_best,
    )


def die_in_saves(before: Path, folder: Path) -> None:
    """For ``Lab.process``: saves step 4 over copies of the job ``before``, killed in front of one file operation each.

    ``folder/<n>``: what the kill in front of operation n left; the last copy's save ran to its end.
    """
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
    for number in itertools.count(1):
        job = folder / str(number)
        shutil.copytree(before, job, symlinks=True)
        child = os.fork()
        if child == 0:
            _die_at_operation(number)
            save_step(job, 4, is_best=True)
            os._exit(0)
        exit_code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if exit_code != -signal.SIGKILL:
            sys.exit(exit_code)


def _die_at_operation(number: int) -> None:
    seen = 0

    def hook(event: str, _: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
