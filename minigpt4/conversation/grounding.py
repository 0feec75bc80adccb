"""What an answer points at: ``<p>phrase</p> {<x1><y1><x2><y2>}`` as phrases with boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from minigpt4.conversation.boxes import DELIMITER, Percents, clamped, find_boxes

_BOX = r"\{(?:<-?\d+>){4}\}"
_BOXES = rf"{_BOX}(?:\s*(?:{DELIMITER})?\s*{_BOX})*"
_PHRASE = re.compile(rf"<p>(?P<phrase>(?:(?!</?p>).)*)</p>\s*(?P<boxes>{_BOXES})|(?P<alone>{_BOXES})", re.DOTALL)
_BARE_NUMBERS = re.compile(r"[\s\d{}<>\[\](),;-]+")
"""An answer of numbers and brackets alone, which is meant as a box however it is written."""
_TAGS = re.compile(rf"</?p>|{DELIMITER}")


@dataclass(frozen=True)
class Entity:
    """One thing that an answer names. ``phrase`` is empty for boxes without a name; boxes are inside 0..100."""

    phrase: str
    boxes: tuple[Percents, ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer for a reader, without box text; ``entity`` is an index, or None for plain text."""

    text: str
    entity: int | None = None


@dataclass(frozen=True)
class Grounded:
    """An answer taken apart: its entities in the order of their first mention, and its text."""

    entities: tuple[Entity, ...]
    pieces: tuple[Piece, ...]

    @property
    def has_boxes(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.entities)


def read_grounded(answer: str) -> Grounded:
    """Entities and text of ``answer``; boxes without area are left out.

    Mentions of one phrase are one entity, whatever their case. Boxes without a phrase are entities of their own without
    a name. An answer that is nothing but four numbers is a box too, as in MiniGPT-v2's demo.
    """
    names: dict[str, int] = {}
    phrases: list[str] = []
    boxes: list[list[Percents]] = []
    pieces: list[Piece] = []
    end = 0
    for start, stop, phrase, found in _mentions(answer):
        pieces.append(Piece(_TAGS.sub("", answer[end:start])))
        end = stop
        if not found:
            pieces.append(Piece(phrase))
            continue
        key = " ".join(phrase.lower().split()) or f" {len(phrases)}"
        if key not in names:
            names[key] = len(phrases)
            phrases.append(" ".join(phrase.split()))
            boxes.append([])
        entity = boxes[names[key]]
        entity += [box for box in found if box not in entity]
        pieces.append(Piece(phrase, names[key]))
    pieces.append(Piece(_TAGS.sub("", answer[end:])))
    entities = tuple(Entity(phrase, tuple(found)) for phrase, found in zip(phrases, boxes, strict=True))
    return Grounded(entities, tuple(piece for piece in pieces if piece.text))


def _mentions(answer: str) -> Iterator[tuple[int, int, str, list[Percents]]]:
    """Start, end, phrase and boxes with area of every place that holds boxes."""
    if _BARE_NUMBERS.fullmatch(answer) and not _PHRASE.search(answer):
        numbers = [int(number) for number in re.findall(r"-?\d+", answer)]
        if len(numbers) == 4 and (found := _with_area([(numbers[0], numbers[1], numbers[2], numbers[3])])):
            yield 0, len(answer), "", found
        return
    for match in _PHRASE.finditer(answer):
        text = match["boxes"] or match["alone"]
        yield match.start(), match.end(), (match["phrase"] or "").strip(), _with_area(find_boxes(text))


def _with_area(boxes: list[Percents]) -> list[Percents]:
    inside = [clamped(box) for box in boxes]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in inside if x1 < x2 and y1 < y2]
