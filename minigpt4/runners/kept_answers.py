"""The held-out answers of the newest and the best validation, one JSON object per line.

::

    <job>/answers/last/<data set>.jsonl     id, question, reference, answer, images, correct, window
    <job>/answers/best/<data set>.jsonl     and, where they are known, section, group, meta

``correct``: metric -> whether it counts the answer as right, for metrics that say so of one answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.files import open_atomically, writing

FOLDER = "answers"
NEWEST = "last"
BEST = "best"


def keep_answers(job_dir: Path, window: int, answers: Mapping[str, Sequence[Mapping[str, Any]]], is_best: bool) -> None:
    """Write the rows of every data set (rank 0). Raises OutputError when the disk takes no more."""
    for kind in (NEWEST, BEST) if is_best else (NEWEST,):
        folder = job_dir / FOLDER / kind
        for name, rows in answers.items():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with open_atomically(folder / f"{file_name(name)}.jsonl") as file:
                for row in rows:
                    file.write(json.dumps({**row, "window": window}, ensure_ascii=False) + "\n")


def file_name(dataset: str) -> str:
    """A data set's name without what a file name may not hold."""
    return re.sub(r"[^\w.-]", "_", dataset).lstrip(".") or "_"
