"""What goes wrong inside a training process: a full disk, a lost loader worker, a rank that is gone or hangs.

``tests.resume_children.rank`` installs one by its name in FAULTS; it comes after the window, or in the save, it is for.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt4.common import checkpoint
from minigpt4.common.errors import OutputError
from minigpt4.common.optim import step_unless
from minigpt4.runners import runner_base
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.tasks import base_task

SAVED, FULL, UNHEARD = 0, 3, 4
"""Exit codes of ``fill_in_saves``'s children."""
_WRITES = ("os.mkdir", "os.symlink", "os.rename")


def _full_disk(rank: int, window: int) -> None:
    """The kernel lets no file grow beyond 20 kB from the save of ``window`` on."""
    write_files = checkpoint._write_files

    def write(draft: Path, *arguments: Any) -> None:
        if int(draft.name.split("_")[2]) == window:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        write_files(draft, *arguments)

    checkpoint._write_files = write


def _after(window: int, action: Callable[[], None]) -> None:
    after_window = RunnerBase._after_window

    def after(self: RunnerBase, number: int, stats: Any) -> bool:
        goes_on = after_window(self, number, stats)
        if number + 1 == window:
            action()
        return goes_on

    RunnerBase._after_window = after  # type: ignore[method-assign]


def _lost_worker(rank: int, window: int) -> None:
    _after(window, lambda: os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL))


def _signal_to_rank_one(number: int) -> Callable[[int, int], None]:
    def install(rank: int, window: int) -> None:
        if rank == 1:
            _after(window, lambda: os.kill(os.getpid(), number))

    return install


def _late_figures(rank: int, window: int) -> None:
    """No fault: figures are read late, as on a GPU. Tells of every step that the host did not wait for."""
    runner_base.can_defer = lambda device: True

    def told(*arguments: Any) -> None:
        print("a step without the host")
        step_unless(*arguments)

    base_task.step_unless = told


FAULTS: dict[str, Callable[[int, int], None]] = {
    "full": _full_disk,
    "worker": _lost_worker,
    "gone": _signal_to_rank_one(signal.SIGKILL),
    "hangs": _signal_to_rank_one(signal.SIGSTOP),
    "late figures": _late_figures,
}


def fill_in_saves(before: Path, folder: Path, save: Callable[[Path], None]) -> None:
    """For ``Lab.process``: ``save`` on copies of the job ``before``; in each, one writing file operation finds no room.

    ``folder/<n>``: what the refusal of operation n left; in the last copy every operation went well.
    """
    for number in itertools.count(1):
        job = folder / str(number)
        shutil.copytree(before, job, symlinks=True)
        child = os.fork()
        if child == 0:
            has_come = _refuse(number)
            try:
                save(job)
            except OutputError as error:
                os._exit(FULL if "the disk is full" in str(error) else 1)
            os._exit(UNHEARD if has_come() else SAVED)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != FULL:
            sys.exit(code)


def _refuse(number: int) -> Callable[[], bool]:
    """No room at the writing operation ``number`` of this process; whether it came to that."""
    seen = 0

    def count(path: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        is_old = event == "os.mkdir" and os.path.isdir(arguments[0])  # needs no room
        if is_write or (event in _WRITES and not is_old):
            count(arguments[0])

    os.fsync = count
    sys.addaudithook(hook)
    return lambda: seen >= number
