"""Boxes as text: ``{<x1><y1><x2><y2>}``, whole percents of the picture's width and height."""

from __future__ import annotations

import re
from collections.abc import Sequence

Percents = tuple[int, int, int, int]
"""x1, y1, x2, y2: left, top, right and bottom, nominally 0..100."""

DELIMITER = "<delim>"
"""Stands between several boxes of one phrase."""
_BOX = re.compile(r"\{<(-?\d+)><(-?\d+)><(-?\d+)><(-?\d+)>\}")


def to_percents(box: Sequence[float], size: tuple[int, int]) -> Percents:
    """``x, y, width, height`` in pixels of a picture of ``size`` (width, height) -> percents, not clamped.

    Cut towards zero and divided before it is multiplied, as MiniGPT-v2 does: pixel 29 of 100 becomes 28.
    """
    x, y, width, height = box
    return (
        int(x / size[0] * 100),
        int(y / size[1] * 100),
        int((x + width) / size[0] * 100),
        int((y + height) / size[1] * 100),
    )


def clamped(percents: Percents) -> Percents:
    """``percents`` with every value moved into 0..100."""
    x1, y1, x2, y2 = (min(100, max(0, value)) for value in percents)
    return x1, y1, x2, y2


def has_area_inside(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether ``x, y, width, height`` covers a part of a picture of ``size``, all in pixels."""
    x, y, width, height = box
    return min(x + width, size[0]) > max(x, 0) and min(y + height, size[1]) > max(y, 0)


def box_text(percents: Percents) -> str:
    """``{<0><33><24><98>}``."""
    return "{" + "".join(f"<{value}>" for value in percents) + "}"


def find_boxes(text: str) -> list[Percents]:
    """All boxes of a text, in order; values as they stand there."""
    found = (match.groups() for match in _BOX.finditer(text))
    return [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in found]


def to_pixels(percents: Percents, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Percents -> left, top, right, bottom in pixels of a picture of ``size`` (width, height)."""
    x1, y1, x2, y2 = percents
    width, height = size
    return x1 / 100 * width, y1 / 100 * height, x2 / 100 * width, y2 / 100 * height


def grounded_phrase(phrase: str, boxes: str) -> str:
    """``<p>two boys</p> {<..>}<delim>{<..>}``: a phrase and the text of its boxes."""
    return f"<p>{phrase}</p> {boxes}"
