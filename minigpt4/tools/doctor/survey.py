"""All records of all splits, over several processes, with a bar."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minigpt4.common.errors import DataError
from minigpt4.conversation.encoding import Encoder
from minigpt4.tools.doctor.compare import Comparison
from minigpt4.tools.doctor.examine import Examiner, Facts
from minigpt4.tools.doctor.opening import Opened
from minigpt4.tools.doctor.result import Result

_CHUNK = 100
_ALONE = 1000
"""Records below which a second process costs more than it saves."""


@dataclass(frozen=True)
class Job:
    """Some consecutive chosen samples of one split."""

    number: int
    start: int
    stop: int


def survey(opened: Opened, encoder: Encoder | None, seed: int, workers: int) -> list[Result]:
    """One result per split, in order. ``workers`` 0 = one per core this process may use.

    Raises DataError when a worker dies.
    """
    examiners = [Examiner(split, encoder, seed) for split in opened.splits]
    results = {title: Result(title) for title in opened.findings}
    for title, findings in opened.findings.items():
        results[title].add(findings)
    in_order = []
    for split in opened.splits:
        result = results[split.title]
        result.size, result.looked_at = len(split.dataset), len(split.chosen)
        result.folders = split.folders
        in_order.append(result)
    comparison = Comparison(examiners)
    for number, facts in examined(examiners, workers):
        in_order[number].add([*facts.findings, *comparison.add(number, facts)])
        in_order[number].count(facts.counts)
    for number, finding in comparison.leaks():
        in_order[number].add([finding])
    return list(results.values())


def examined(examiners: Sequence[Examiner], workers: int) -> Iterator[tuple[int, Facts]]:
    """Facts of every chosen sample with the number of its split, in order. Shows a bar on a terminal."""
    jobs = [
        Job(number, start, min(start + _CHUNK, len(item.split.chosen)))
        for number, item in enumerate(examiners)
        for start in range(0, len(item.split.chosen), _CHUNK)
    ]
    total = sum(job.stop - job.start for job in jobs)
    count = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    if count == 1 or (not workers and total < _ALONE):
        done = ((job, _look(examiners, job)) for job in jobs)
        yield from _with_bar(done, examiners, total)
        return
    # forked workers share the annotations; elsewhere they are sent once
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(count, context, _start, (list(examiners),)) as pool:
        # every worker is forked by the first submission, before the bar starts a thread
        waiting = deque((job, pool.submit(_work, job)) for job in jobs)
        try:
            yield from _with_bar(_finished(waiting), examiners, total)
        except BrokenProcessPool:
            raise DataError("a worker process died (out of memory?); try fewer: --workers 1") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(waiting: deque[tuple[Job, Future[list[Facts]]]]) -> Iterator[tuple[Job, list[Facts]]]:
    while waiting:
        job, future = waiting.popleft()  # what has been taken in is let go
        yield job, future.result()


def _with_bar(
    done: Iterator[tuple[Job, list[Facts]]], examiners: Sequence[Examiner], total: int
) -> Iterator[tuple[int, Facts]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task, begun = progress.add_task("", total=total, rate=""), time.monotonic()
        for job, many in done:
            for facts in many:
                yield job.number, facts
            progress.advance(task, len(many))
            rate = progress.tasks[0].completed / max(1e-6, time.monotonic() - begun)
            progress.update(task, description=examiners[job.number].split.title, rate=f"{rate:,.0f} records/s")


def _look(examiners: Sequence[Examiner], job: Job) -> list[Facts]:
    return [examiners[job.number].examine(place) for place in range(job.start, job.stop)]


_examiners: list[Examiner] = []
"""Of this worker process."""


def _start(examiners: list[Examiner]) -> None:
    _examiners[:] = examiners


def _work(job: Job) -> list[Facts]:
    return _look(_examiners, job)
