"""Scores of benchmarks: a table in the terminal and ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from minigpt4.common.errors import DataError
from minigpt4.common.files import write_atomically

RESULTS = "results.json"


@dataclass(frozen=True)
class Result:
    """Score in percent of one data set, or of one split of it. ``errors``: questions without an answer, all wrong."""

    name: str
    metric: str
    score: float
    questions: int
    errors: int = 0
    details: dict[str, Any] = field(default_factory=dict)


def keep_results(folder: Path, results: Sequence[Result], about: dict[str, str]) -> None:
    """Put ``results`` into ``results.json``; scores of other data sets stay. ``about``: weights and settings of each.

    Raises DataError for a file of that name that holds something else.
    """
    path = folder / RESULTS
    content: Any = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: is no JSON ({error}); remove it, or change run.save_path") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}: found a {type(content).__name__}, expected scores; change run.save_path")
    for result in results:
        values = asdict(result)
        content[values.pop("name")] = values | {"about": about}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def show_results(results: Sequence[Result], console: Console) -> None:
    """The scores as a table."""
    table = Table(box=box.SIMPLE)
    for title in ("data set", "metric"):
        table.add_column(title)
    for title in ("score", "questions", "errors"):
        table.add_column(title, justify="right")
    for one in results:
        table.add_row(one.name, one.metric, f"{one.score:.2f}", f"{one.questions:,}", f"{one.errors:,}")
    console.print(table)


def write_json(path: Path, content: Any) -> None:
    """Predictions in the form the published evaluation writes them."""
    write_atomically(path, json.dumps(content, ensure_ascii=False) + "\n")
