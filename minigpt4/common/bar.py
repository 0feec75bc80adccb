"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from minigpt4.common.logger import console

log = logging.getLogger(__name__)

_LINE_S = 20.0
"""Seconds between two lines of progress where no bar can be shown."""


class Advance:
    """Tells how far the work is: units done, rate, time left."""

    def __init__(self, title: str, unit: str, total: int, bar: Progress | None, is_told: bool) -> None:
        self._title, self._unit, self._total, self._bar, self._is_told = title, unit, total, bar, is_told
        self._begun = self._said = time.monotonic()
        if bar is not None:
            bar.add_task(title, total=total, numbers="")

    def __call__(self, done: int) -> None:
        """``done`` units, all ranks together."""
        now = time.monotonic()
        rate = done / max(now - self._begun, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self._total - done) / rate)) if rate else "unknown"
        numbers = f"{done:,} of {self._total:,} {self._unit}  {rate:.1f} {self._unit}/s  eta {left}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, numbers=numbers)
        elif self._is_told and (now - self._said > _LINE_S or done == self._total):
            self._said = now
            log.info("%s: %s", self._title, numbers)


@contextlib.contextmanager
def progress(title: str, unit: str, total: int, is_told: bool) -> Iterator[Advance]:
    """Shows a bar while the block runs. ``is_told`` is False on ranks that stay silent."""
    if not (is_told and console.is_terminal):
        yield Advance(title, unit, total, None, is_told)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn())
    with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console) as bar:
        yield Advance(title, unit, total, bar, True)
