"""Boxes, after the quickstart: train [refer], [identify] and [detection], score held-out faces as RefCOCO is scored.

``make quickstart-boxes`` runs what the quickstart has not done yet, then this.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from minigpt4.metrics.grounding import is_located, overlap

Record = dict[str, Any]
CHOSEN = ("the face", "the eyes", "the mouth", "the glasses", "the left face", "the right face")
"""Phrases of the drawn examples."""


def constant_boxes(refer: Sequence[Record]) -> dict[str, list[float]]:
    """The mean training box of every phrase: what a model that sees nothing could learn to say."""
    known: dict[str, list[list[float]]] = defaultdict(list)
    for record in refer:
        known[record["phrase"]].append(record["box"])
    return {phrase: [sum(side) / len(boxes) for side in zip(*boxes, strict=True)] for phrase, boxes in known.items()}


def scores_by_phrase(
    expressions: Sequence[Record], answers: dict[str, list[str]], constant: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """Phrase -> share located (overlap above 0.5) by the model and by the constant box, and n.

    answers: ``img_id`` -> answers that begin with a box; an expression without one is wrong.
    """
    rows: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for record in expressions:
        phrase, box, size = record["sents"], record["bbox"], (record["width"], record["height"])
        given = answers.get(record["img_id"], [])
        right = bool(given) and is_located(given[0], box, size)
        rows[phrase].append((right, overlap(_corners(constant[phrase]), _corners(box)) > 0.5))
    rows["all"] = [row for group in list(rows.values()) for row in group]
    return {phrase: _summary(group) for phrase, group in rows.items()}


def boxes_table(scores: dict[str, dict[str, float]]) -> Table:
    """Scores as ``make quickstart-boxes`` prints them."""
    table = Table(title="Held-out faces: boxes that overlap by more than half")
    table.add_column("[refer] give me the location of")
    for title in ("located", "constant box", "n"):
        table.add_column(title, justify="right")
    for phrase, row in scores.items():
        if phrase == "all":
            table.add_section()
        table.add_row(phrase, f"{row['located']:.2f}", f"{row['constant']:.2f}", str(int(row["n"])))
    return table


def draw_examples(
    expressions: Sequence[Record], answers: dict[str, list[str]], images: Path, path: Path, each: int = 2
) -> None:
    """Writes a picture of the first answers to each of ``CHOSEN``, drawn as the demos draw them."""
    from PIL import Image

    from minigpt4.conversation.grounding import read_grounded
    from minigpt4.processors.box_drawing import draw_boxes, shrunk

    side, tiles = 240, list[Image.Image]()
    for phrase in CHOSEN:
        asked = [record for record in expressions if record["sents"] == phrase and answers.get(record["img_id"])]
        for record in asked[:each]:
            picture = Image.open(images / f"{record['img_id'].rpartition('_')[0]}.jpg")
            answer = f"<p>{phrase}</p> {answers[record['img_id']][0]}"
            tiles.append(shrunk(draw_boxes(picture, read_grounded(answer).entities), side))
    sheet = Image.new("RGB", (len(CHOSEN) * side, each * side), "white")
    for number, tile in enumerate(tiles):
        column, row = divmod(number, each)
        sheet.paste(tile, (column * side, row * side))
    draft = path.with_name(f".{path.name}")
    sheet.save(draft, format="PNG", optimize=True)
    draft.replace(path)


def read_records(path: Path) -> Any:
    """A JSON file of the drawn data."""
    return json.loads(path.read_text(encoding="utf-8"))


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _summary(group: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    n = len(group)
    return {"located": sum(row[0] for row in group) / n, "constant": sum(row[1] for row in group) / n, "n": n}
