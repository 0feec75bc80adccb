"""Held-out answers as reports read them: those a run has kept, and the predictions of any program."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from minigpt4.common.errors import DataError, nearest
from minigpt4.metrics.accuracy import is_exact, plain, word_overlap

NEEDED = ("id", "question", "answer", "reference")
_OTHER = {*NEEDED, "images", "image", "correct", "section", "group", "meta", "window", "error"}
_MOST_LABELS = 20
_MOST_WORDS = 4
_MOST_GROUPS = 12
_MOST_PROPERTIES = 8
_LEAST = 2
"""Rows of a group that is shown."""
_LONGEST = 40


@dataclass(frozen=True)
class Answer:
    """One line. ``references``: any of them is right. ``overlap``: 0 to 1, words shared with the nearest reference."""

    id: str
    question: str
    answer: str
    references: tuple[str, ...]
    images: tuple[Path, ...] = ()
    is_right: bool = False
    overlap: float = 0.0
    section: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def picture(self) -> str:
        """What rows about the same picture share; the row itself where there is none."""
        return str(self.images[0]) if self.images else f"id {self.id}"


@dataclass(frozen=True)
class AnswerSet:
    """The rows of one file. ``window``: when they were given, if a run kept them."""

    name: str
    path: Path
    rows: Sequence[Answer]
    window: int | None = None

    @property
    def pictures(self) -> list[str]:
        """What was asked about together, one per row."""
        return [row.picture for row in self.rows]

    @cached_property
    def by_key(self) -> dict[tuple[str, str, int], Answer]:
        """Rows by id and reference, and by how often both came before: what pairs the rows of two runs."""
        seen: Counter[tuple[str, str]] = Counter()
        found = {}
        for row in self.rows:
            key = (row.id, "\n".join(row.references))
            found[(*key, seen[key])] = row
            seen[key] += 1
        return found

    def sections(self) -> dict[str, list[Answer]]:
        """Section -> its rows; empty when there is one at most."""
        return _grouped(self.rows, [row.section for row in self.rows])

    def slices(self) -> dict[str, dict[str, list[Answer]]]:
        """Property -> value -> rows, for properties that make groups and are not the answer itself."""
        found = {}
        for name in dict.fromkeys(name for row in self.rows for name in row.properties):
            values = [row.properties.get(name, "") for row in self.rows]
            tells = all(
                not value or any(plain(value) == plain(reference) for reference in row.references)
                for value, row in zip(values, self.rows, strict=True)
            )
            groups = {} if tells else _grouped(self.rows, values)
            if len(groups) > 1 and max(map(len, groups.values())) >= _LEAST:
                found[name] = groups
        return dict(list(found.items())[:_MOST_PROPERTIES])


def has_labels(rows: Sequence[Answer]) -> bool:
    """Whether the references are a few short labels that repeat, so that F1 and a confusion matrix mean something."""
    labels = {plain(row.references[0]) for row in rows}
    words = max((len(label.split()) for label in labels), default=0)
    return 1 < len(labels) <= _MOST_LABELS and words <= _MOST_WORDS and len(rows) >= _LEAST * len(labels)


def read_answers(path: Path, name: str = "") -> AnswerSet:
    """A file of JSON lines with ``id, question, answer, reference``. Raises DataError that names the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"predictions '{path}': cannot be read ({error})") from error
    rows, window = [], None
    for line_number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = _record(line, f"{path}, line {line_number}")
            rows.append(_answer(record, path.parent))
            window = record["window"] if isinstance(record.get("window"), int) else window
    if not rows:
        raise DataError(f"predictions '{path}': holds no answers")
    return AnswerSet(name or path.stem, path, rows, window)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {type(record).__name__}, expected an object with {', '.join(NEEDED)}")
    missing = [key for key in NEEDED if record.get(key) is None]
    if missing:
        known = ", ".join(map(str, record))
        raise DataError(f"{where}: field '{missing[0]}' is missing{nearest(missing[0], record)}; found: {known}")
    return record


def _answer(record: Mapping[str, Any], folder: Path) -> Answer:
    given = record["reference"]
    references = tuple(map(str, given)) if isinstance(given, list) and given else (str(given),)
    answer = str(record["answer"])
    nested = record.get("meta")
    fields = {
        **{key: value for key, value in record.items() if key not in _OTHER},
        **(nested if isinstance(nested, dict) else {}),
        **({"group": record["group"]} if "group" in record else {}),
    }
    return Answer(
        id=str(record["id"]),
        question=str(record["question"]),
        answer=answer,
        references=references,
        images=_images(record, folder),
        is_right=_is_right(record.get("correct"), answer, references),
        overlap=max(word_overlap(answer, reference) for reference in references),
        section=str(record.get("section") or ""),
        properties={
            str(key): str(value)
            for key, value in fields.items()
            if isinstance(value, (str, int, float)) and 0 < len(str(value)) <= _LONGEST
        },
    )


def _is_right(correct: Any, answer: str, references: Sequence[str]) -> bool:
    """What the file says, by its first metric; else whether the answer equals a reference."""
    if isinstance(correct, dict):
        correct = next(iter(correct.values()), None)
    return correct if isinstance(correct, bool) else any(is_exact(answer, reference) for reference in references)


def _images(record: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    given = record.get("images", record.get("image"))
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    paths = [Path(name) for name in names if isinstance(name, str) and name and "\0" not in name]
    return tuple(path if path.is_absolute() or path.is_file() else folder / path for path in paths)


def _grouped(rows: Sequence[Answer], values: Sequence[str]) -> dict[str, list[Answer]]:
    """Value -> rows in the order of names; {} for fewer than two values, or too many to read."""
    groups: dict[str, list[Answer]] = {}
    for row, value in zip(rows, values, strict=True):
        if value:
            groups.setdefault(value, []).append(row)
    return dict(sorted(groups.items())) if 1 < len(groups) <= _MOST_GROUPS else {}
