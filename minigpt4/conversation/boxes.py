"""Boxes as text: ``{<x1><y1><x2><y2>}``, whole percents of the picture's width and height."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minigpt4.common.errors import DataError

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


_SCALES = {"0..1": 1.0, "0..100": 100.0}
_OVERHANG = 0.02
"""Share of a side by which a box may stick out: annotators draw past the edge, a wrong unit or order does more."""
_NUMBERS = {"xywh": "x, y, width, height", "xyxy": "left, top, right, bottom"}


@dataclass(frozen=True)
class BoxReader:
    """Boxes of a data set: ``order`` xywh or xyxy, ``unit`` pixels, 0..1 or 0..100 of width and height.

    ``is_loose``: boxes that stick out are cut, however far, as in data sets that are published with such.
    """

    order: str = "xywh"
    unit: str = "pixels"
    is_loose: bool = False

    def percents(self, value: Any, size: tuple[int, int]) -> Percents:
        """Whole percents inside a picture of ``size``; ``value`` is four numbers or a text of them.

        Raises DataError for anything else, and for a box that cannot be meant in this order and unit.
        """
        numbers = self._numbers(value)
        left, top, right, bottom = corners = self._corners(numbers)
        told = f"field 'box' holds {value!r}"
        width, height = limits = (_SCALES[self.unit],) * 2 if self.unit in _SCALES else size
        covers = min(right, width) > max(left, 0) and min(bottom, height) > max(top, 0)
        of_size = f"a picture of {size[0]} x {size[1]}"
        if right < left or bottom < top:
            raise DataError(f"{told}, which ends before it begins; is it box_format: xywh?")
        if not covers:
            raise DataError(f"{told}, which covers nothing of {of_size}{self._hint(numbers, limits)}")
        if not self.is_loose:
            self._check_fit(told, numbers, corners, size, limits)
        if self.unit in _SCALES:
            return clamped(_four(int(number / width * 100 + 1e-6) for number in corners))  # 0.29 is 29, not 28
        if self.order == "xywh":
            return clamped(to_percents(numbers, size))
        return clamped(_four(int(number / side * 100) for number, side in zip(corners, (*size, *size), strict=True)))

    def _numbers(self, value: Any) -> list[float]:
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        try:
            numbers = [float(part) for part in parts or ()]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            raise DataError(f"field 'box' holds {value!r}, expected {_NUMBERS[self.order]} in {self.unit}")
        return numbers

    def _corners(self, numbers: Sequence[float]) -> tuple[float, float, float, float]:
        x, y, third, fourth = numbers
        return (x, y, x + third, y + fourth) if self.order == "xywh" else (x, y, third, fourth)

    def _check_fit(
        self,
        told: str,
        numbers: Sequence[float],
        corners: Sequence[float],
        size: tuple[int, int],
        limits: tuple[float, float],
    ) -> None:
        slack = [_OVERHANG * limit + (self.unit == "pixels") for limit in (*limits, *limits)]
        ends = zip(corners, (*limits, *limits), slack, strict=True)
        if any(number < -more or number > limit + more for number, limit, more in ends):
            shown = ", ".join(f"{number:g}" for number in corners)
            within = f"{size[0]} x {size[1]} pixels" if self.unit == "pixels" else self.unit
            hint = self._hint(numbers, limits)
            raise DataError(f"{told}, from left, top to right, bottom {shown}: outside of {within}{hint}")
        if self.unit == "pixels" and max(numbers) <= 1 and max(size) > 1:
            raise DataError(f"{told}, less than a pixel of {size[0]} x {size[1]}; is it box_unit: 0..1?")

    def _hint(self, numbers: Sequence[float], limits: tuple[float, float]) -> str:
        """What would make sense of the numbers, if anything would."""
        x, y, third, fourth = numbers
        if self.order == "xywh" and x < third <= limits[0] and y < fourth <= limits[1]:
            return "; is it box_format: xyxy?"
        if self.unit == "0..1" and min(numbers) >= 0:
            return f"; is it box_unit: {'0..100' if max(numbers) <= 100 else 'pixels'}?"
        return "; is it box_unit: pixels?" if self.unit == "0..100" and min(numbers) >= 0 else ""


def _four(numbers: Iterable[int]) -> Percents:
    x1, y1, x2, y2 = numbers
    return x1, y1, x2, y2
