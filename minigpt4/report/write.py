"""Writes report.html: on request, and quickly at the end of a training run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt4.common.errors import ConfigError, MiniGPT4Error
from minigpt4.common.files import write_atomically
from minigpt4.report.answers import read_answers
from minigpt4.report.blur import Blur
from minigpt4.report.job import Job, read_job
from minigpt4.report.page import render
from minigpt4.report.pictures import Album

log = logging.getLogger(__name__)

FILE = "report.html"
MAX_BYTES = 6_000_000
"""Of all pictures of a report together."""
_SECONDS_AFTER_TRAINING = 0.8
_TROUBLE = (
    MiniGPT4Error, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError, MemoryError, ImportError,
)  # fmt: skip
"""What a damaged folder or a mistake of ours may raise here; a training that succeeded must not end in it."""


@dataclass(frozen=True)
class Wishes:
    """Options of ``minigpt4 report``. ``predictions``: files of the first run, or pairs of files of two runs."""

    out: Path | None = None
    predictions: Sequence[Sequence[Path]] = ()
    blur: str = ""  # "" | auto | whole
    max_bytes: int = MAX_BYTES
    max_seconds: float | None = None


def write_report(runs: Sequence[str | Path], wishes: Wishes | None = None) -> Path:
    """Write the page of one or two runs; returns its path. Raises MiniGPT4Error."""
    wishes = wishes or Wishes()
    jobs = [read_job(path) for path in runs]
    answers = [list(job.answers) for job in jobs]
    for files in wishes.predictions:
        if len(jobs) == 2 and len(files) != 2:
            raise ConfigError(f"--predictions: found {len(files)} file(s), expected one of each run: FILE FILE2")
        for place, path in enumerate(files):
            answers[place if len(jobs) == 2 else 0].append(read_answers(path, _set_name(files, path, len(jobs))))
    album = Album(wishes.max_bytes, Blur(wishes.blur == "whole") if wishes.blur else None, wishes.max_seconds)
    out = wishes.out or _default_path(jobs)
    write_atomically(out, render(jobs, answers, album))
    return out


def write_after_training(job_dir: Path) -> None:
    """``report.html`` of a run that has just ended. Whatever goes wrong is a warning: the training has succeeded."""
    try:
        path = write_report([job_dir], Wishes(max_seconds=_SECONDS_AFTER_TRAINING))
    except _TROUBLE as error:
        cause = str(error) if isinstance(error, MiniGPT4Error) else repr(error)
        log.warning("no report: %s; once that is settled: minigpt4 report %s", cause, job_dir)
    else:
        log.info("report %s", path)


def _default_path(jobs: Sequence[Job]) -> Path:
    if len(jobs) == 1:
        return jobs[0].folder / FILE
    return jobs[0].folder / f"report_against_{jobs[1].folder.parent.name}_{jobs[1].folder.name}.html"


def _set_name(files: Sequence[Path], path: Path, num_jobs: int) -> str:
    """Two files of a pair are one data set, named as the first."""
    return files[0].stem if num_jobs == 2 else path.stem
