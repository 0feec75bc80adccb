"""What is asked and what came back, and the two ways to write questions for ``minigpt4 predict``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.common.errors import DataError, nearest
from minigpt4.common.types import IMAGE_TAG
from minigpt4.datasets.sources import PICTURES, read_sources

KEYS = ("id", "image", "images", "question")
"""Fields of a question file that mean something; the others come back with the answer."""


@dataclass(frozen=True)
class Question:
    """One question in a conversation of its own; answers are kept by ``id``.

    images       picture files, in order; may be empty.
    prompt       the question as a person asks it; when ``is_rendered`` the whole text that the model reads, with
                 IMAGE_TAG once per picture, to which nothing but BOS is added (published evaluations).
    meta         what belongs to the question and comes back with the answer; plain JSON values.
    """

    id: str
    images: tuple[str, ...]
    prompt: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    is_rendered: bool = False


@dataclass(frozen=True)
class Answer:
    """The answer to a question; ``error`` says why there is none."""

    question: Question
    text: str
    error: str = ""

    def record(self) -> dict[str, Any]:
        """The line of a result file."""
        asked = self.question
        line: dict[str, Any] = {"id": asked.id, "images": list(asked.images), "question": asked.prompt}
        line |= {"answer": self.text}
        line |= {"error": self.error} if self.error else {}
        return line | ({"meta": dict(asked.meta)} if asked.meta else {})


def check_ids(questions: Sequence[Question]) -> None:
    """Raises DataError when there are no questions, or when two have the same id."""
    if not questions:
        raise DataError("there are no questions to ask")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"two questions have the id '{question.id}'; answers are kept by id")
        seen.add(question.id)


def questions_of_folder(folder: Path, texts: Sequence[str]) -> list[Question]:
    """Every text about every picture in ``folder`` and below, pictures in order of their names.

    The id is the picture's path below ``folder``; '#2' and so on tells the texts apart. Raises DataError.
    """
    if not folder.is_dir():
        raise DataError(f"'{folder}' is no folder of pictures")
    names = sorted(
        Path(current, name).relative_to(folder).as_posix()
        for current, _, files in os.walk(folder)
        for name in files
        if Path(name).suffix.lower() in PICTURES
    )
    if not names:
        raise DataError(f"'{folder}' holds no pictures ({', '.join(PICTURES)})")
    return [
        Question(name if number == 1 else f"{name}#{number}", (str(folder / name),), text)
        for name in names
        for number, text in enumerate(texts, start=1)
    ]


def questions_of_file(path: Path, image_root: Path | None) -> list[Question]:
    """Records ``question``, ``image`` or ``images``, ``id`` of any annotation file (JSON, JSON lines, CSV, Parquet).

    Pictures are looked for below ``image_root``, else beside the file. A record without ``id`` gets its place in the
    file, counted from 1. Raises DataError that names the record.
    """
    records, root = read_sources([path]), image_root or path.parent
    questions = []
    for index, record in enumerate(records):
        where = records.where(index)
        text = record.get("question")
        if not isinstance(text, str) or not text.strip():
            known = ", ".join(record)
            raise DataError(
                f"{where}: field 'question' is missing or empty{nearest('question', record)}; found: {known}"
            )
        if IMAGE_TAG in text:
            raise DataError(f"{where}: a question must not hold '{IMAGE_TAG}', which stands for a picture")
        identity = str(record.get("id", index + 1))
        rest = {key: value for key, value in record.items() if key not in KEYS}
        questions.append(Question(identity, _images(record, root, where), text, rest))
    check_ids(questions)
    return questions


def _images(record: Mapping[str, Any], root: Path, where: str) -> tuple[str, ...]:
    if "image" in record and "images" in record:
        raise DataError(f"{where}: holds both 'image' and 'images'; write one of them")
    given = record.get("images", record.get("image"))
    if given is None or given == "":
        return ()
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: field 'image' holds {given!r}, expected a file name or a list of them")
    return tuple(str(root / name) for name in names)
