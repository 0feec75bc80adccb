"""FaceXBench: multiple choice about one or several pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.evaluation.faces.cases import LETTERS, Case, FaceSet, Source, existing

_FILE_KEYS = ("category", "sub-category", "questions")
_KEYS = ("image_paths", "question_text", "options", "correct_answer_option")


@registry.register("face_set", "facexbench")
def facexbench(source: Source) -> FaceSet:
    """FaceXBench: benchmark/*.json with lettered options, pictures below benchmark/images."""
    folder = source.root / "benchmark" if (source.root / "benchmark").is_dir() else source.root
    files = sorted(folder.glob("*.json"))
    if not files:
        raise DataError(f"--data-root '{source.root}': no benchmark/*.json")
    contents = {path: _content(path) for path in files}
    known = list(dict.fromkeys(str(content["sub-category"]) for content in contents.values()))
    chosen = source.chosen(known, known)
    cases: list[Case] = []
    for path, content in contents.items():
        if content["sub-category"] not in chosen:
            continue
        meta: dict[str, str] = {
            key: str(content[key]) for key in ("category", "num_images", "dataset") if key in content
        }
        for number, question in content["questions"].items():
            cases.append(_case(question, path, str(number), str(content["sub-category"]), meta))
    return FaceSet("facexbench", tuple(cases))


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    missing = [key for key in _FILE_KEYS if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content["questions"], dict):
        raise DataError(f"{path}: expected an object with {', '.join(_FILE_KEYS)}, questions by number")
    return dict(content)


def _case(question: Mapping[str, Any], path: Path, number: str, section: str, meta: Mapping[str, str]) -> Case:
    where = f"{path}, question {number}"
    missing = [key for key in _KEYS if key not in question]
    if missing:
        raise DataError(f"{where}: field '{missing[0]}' is missing; found: {', '.join(question)}")
    options, letter = tuple(map(str, question["options"])), str(question["correct_answer_option"])
    if letter not in LETTERS[: len(options)] or len(letter) != 1:
        raise DataError(f"{where}: correct_answer_option '{letter}' for {len(options)} options")
    if len(set(options)) != len(options):
        raise DataError(f"{where}: two options read alike: {', '.join(options)}")
    images = tuple(str(existing(path.parent / name, where)) for name in question["image_paths"])
    answer = options[LETTERS.index(letter)]
    return Case(f"{path.stem}/{number}", images, str(question["question_text"]), answer, section, None, options, meta)
