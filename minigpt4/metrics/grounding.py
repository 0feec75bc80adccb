"""Scores of boxes: overlap, and MiniGPT-v2's rule for referring expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence

Corners = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_BOX_FIRST = re.compile(r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}")
_INTEGER = re.compile(r"-?\d+")


def overlap(first: Corners, second: Corners, extra: float = 1.0) -> float:
    """Intersection over union. ``extra`` is added to every side: 1 counts both edge pixels in, as RefCOCO's scorers do.

    Corners are taken as they stand, also outside of the picture. A union that covers nothing gives 0.
    """
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]) + extra)
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]) + extra)
    areas = [(right - left + extra) * (bottom - top + extra) for left, top, right, bottom in (first, second)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def refer_text(answer: str) -> str:
    """An answer as it is looked at: without unknown tokens and without spaces."""
    return answer.replace("<unk>", "").replace(" ", "").strip()


def begins_with_box(text: str) -> bool:
    """Whether ``refer_text`` starts with ``{<x1><y1><x2><y2>}``; others are asked again or count as wrong."""
    return _BOX_FIRST.match(text) is not None


def answered_corners(text: str, size: tuple[int, int], resolution: float = 100.0) -> Corners | None:
    """The box of an answer in pixels of a picture of ``size`` (width, height), not clamped.

    Every integer of the text counts: a second box, or a number behind the first, makes it None.
    """
    numbers = [int(number) for number in _INTEGER.findall(text)]
    if len(numbers) != 4:
        return None
    width, height = size
    x1, y1, x2, y2 = numbers
    return x1 / resolution * width, y1 / resolution * height, x2 / resolution * width, y2 / resolution * height


def is_located(text: str, box: Sequence[float], size: tuple[int, int], resolution: float = 100.0) -> bool:
    """Whether an answer covers ``box`` (x, y, width, height in pixels) by more than half (overlap above 0.5)."""
    found = answered_corners(text, size, resolution)
    x, y, width, height = box
    return found is not None and overlap(found, (x, y, x + width, y + height)) > 0.5
