"""Two models on the same questions: differences question by question (paired bootstrap)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.errors import DataError
from minigpt4.metrics import classification as table
from minigpt4.metrics.intervals import Interval, paired_difference

_LABEL_SCORES = {
    "accuracy": table.accuracy,
    "balanced_accuracy": table.balanced_accuracy,
    "macro_f1": table.macro_f1,
}


@dataclass(frozen=True)
class Difference:
    """``found``: score of the new run minus that of the other, over ``n`` questions that both answered."""

    section: str
    score: str
    n: int
    found: Interval


def read_predictions(folder: Path, mode: str) -> dict[str, dict[str, Any]]:
    """Answered lines of ``predictions.<mode>.jsonl`` by id. Raises DataError."""
    path = folder / f"predictions.{mode}.jsonl"
    if not path.is_file():
        raise DataError(f"--compare '{folder}': no {path.name}; it must be the --out of a finished run of this mode")
    lines = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            lines[line["id"]] = line
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: is no prediction ({error!r})") from error
    return {key: line for key, line in lines.items() if "error" not in line}


def differences(new: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """Per section and score; over the questions that both runs answered, with the same reference.

    Raises DataError when there are none.
    """
    shared = [key for key in new if key in other and new[key]["reference"] == other[key]["reference"]]
    if not shared:
        raise DataError("--compare: the two runs share no question; they must be of the same data set and sections")
    result: list[Difference] = []
    for section in dict.fromkeys(str(new[key]["section"]) for key in shared):
        pairs = [(other[key], new[key]) for key in shared if new[key]["section"] == section]
        pictures = [json.dumps(line["images"]) for _, line in pairs]
        result += _closed(section, pairs, pictures) if "correct" in pairs[0][1] else _text(section, pairs, pictures)
    return result


Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def _closed(section: str, pairs: Sequence[Pair], pictures: Sequence[str]) -> list[Difference]:
    names = sorted({str(line["reference"]) for _, line in pairs})
    references = [names.index(line["reference"]) for _, line in pairs]
    given = [[_given(line, names) for line in lines] for lines in zip(*pairs, strict=True)]
    return [
        Difference(
            section,
            name,
            len(pairs),
            table.paired_score_difference(score, references, (given[0], given[1]), len(names), pictures),
        )
        for name, score in _LABEL_SCORES.items()
        if name == "accuracy" or pairs[0][1]["extracted"]["kind"] == "label"  # texts of options are no classes
    ]


def _given(line: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Number of the given label; None for one that no reference has, which is as wrong as no label."""
    label = line["extracted"]["label"]
    return names.index(label) if label in names else None


def _text(section: str, pairs: Sequence[Pair], pictures: Sequence[str]) -> list[Difference]:
    result = []
    for name in ("rouge_l", "attribute_recall"):
        chosen = [i for i, pair in enumerate(pairs) if all(name in line["scores"] for line in pair)]
        if chosen:
            before, after = ([pairs[i][side]["scores"][name] for i in chosen] for side in (0, 1))
            found = paired_difference(before, after, [pictures[i] for i in chosen])
            result.append(Difference(section, name, len(chosen), found))
    return result
