"""What a job folder holds, read without models or tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minigpt4.common.checkpoint import BEST, CONFIG, LAST, MANIFEST, STATE, is_job_name
from minigpt4.common.errors import CheckpointError
from minigpt4.common.logger import LOG_FILE, read_log
from minigpt4.report.answers import AnswerSet, read_answers
from minigpt4.report.numbers import number
from minigpt4.runners import kept_answers

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One training run; parts that were not written are empty.

    windows, checks, canaries: lines of log.txt by kind, in order. resumes: windows where the run was taken up again.
    state: counters of the last checkpoint. best: step of the checkpoint that ``best`` names.
    """

    folder: Path
    windows: Rows = field(default_factory=list)
    checks: Rows = field(default_factory=list)
    canaries: Rows = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    best: int | None = None
    answers: list[AnswerSet] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Job name and time: 'my_faces/20260101_120000'."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def last(self) -> dict[str, Any]:
        """The last logged window; empty before the first."""
        return self.windows[-1] if self.windows else {}

    @property
    def window(self) -> int:
        """Optimiser steps done, as far as files tell."""
        known = (number(source, "window") for source in (self.last, self.manifest, self.state))
        return int(max((value for value in known if value is not None), default=0))

    @property
    def status(self) -> str:
        """finished, stopped early, or stopped (also: still running)."""
        if self.state.get("is_over"):
            return "stopped early"
        return "finished" if number(self.last, "eta_s") == 0 else "not finished"

    @property
    def seconds(self) -> float:
        """Time of all starts together; every start counts from zero."""
        total = before = 0.0
        for row in self.windows:
            now = number(row, "elapsed_s") or 0.0
            total += now - before if now >= before else now
            before = now
        return total


def read_job(path: str | Path) -> Job:
    """A job folder, a checkpoint in one, or a folder of jobs (the newest). Raises CheckpointError, DataError."""
    folder = find_job(Path(path))
    rows = (
        [row for row in read_log(folder / LOG_FILE) if isinstance(row, dict)] if (folder / LOG_FILE).is_file() else []
    )
    text = _text(folder / CONFIG)
    config = _yaml(text, folder / CONFIG) if text else _logged_config(rows)
    last, best = folder / "checkpoints" / LAST, folder / "checkpoints" / BEST
    manifest = _json(folder / MANIFEST) or _json(last / MANIFEST)
    return Job(
        folder=folder,
        windows=[row for row in rows if "event" not in row and number(row, "window") is not None],
        checks=_events(rows, "validation"),
        canaries=_events(rows, "canaries"),
        resumes=[int(number(row, "window") or 0) for row in _events(rows, "resumed")],
        config=config,
        config_text=text or yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        manifest=manifest,
        state=_json(last / STATE),
        best=int(step) if (step := number(_json(best / MANIFEST), "step")) is not None else None,
        answers=list(_answers(folder)),
    )


def find_job(given: Path) -> Path:
    """The job folder that ``given`` is, lies in, or holds. Raises CheckpointError."""
    if not given.is_dir():
        raise CheckpointError(f"run '{given}': no such folder; give a job folder, output/<job>/<time>")
    folder = given.resolve()
    for candidate in (folder, *list(folder.parents)[:2]):
        if _is_job(candidate) and (candidate == folder or "checkpoints" in folder.relative_to(candidate).parts):
            return candidate
    jobs = sorted(path for path in folder.iterdir() if is_job_name(path.name) and _is_job(path))
    if not jobs:
        raise CheckpointError(
            f"run '{given}': holds no {LOG_FILE}, no {MANIFEST} and no job; give a job folder, output/<job>/<time>"
        )
    return max(jobs, key=lambda path: path.stat().st_mtime)


def _is_job(folder: Path) -> bool:
    is_checkpoint = folder.parent.name == "checkpoints"
    return not is_checkpoint and any((folder / name).is_file() for name in (LOG_FILE, MANIFEST))


def _events(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if row.get("event") == kind]


def _logged_config(rows: Rows) -> dict[str, Any]:
    return next((_mapping(row["config"]) for row in reversed(rows) if "config" in row), {})


def _answers(folder: Path) -> Iterator[AnswerSet]:
    """Those of the best validation where there is one, else of the newest."""
    kinds = {kind: sorted((folder / kept_answers.FOLDER / kind).glob("*.jsonl")) for kind in (LAST, BEST)}
    for path in kinds[BEST] or kinds[LAST]:
        yield read_answers(path)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(_text(path) or "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error})") from error


def _yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        return _mapping(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path}: is no YAML ({error})") from error


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
