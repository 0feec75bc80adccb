"""Boxes of an answer on its picture: one colour per thing, labels that can be read. Pillow alone."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minigpt4.common.files import writing
from minigpt4.conversation.boxes import to_pixels
from minigpt4.conversation.grounding import Entity

Rectangle = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

_COLOURS = tuple("#" + code for code in "ffd400 00b4ff ff5a36 3ddc5b ff6ad5 00e0c6 a06bff ff9d00 c6ff3d ff2d6f".split())
_LONG_SIDE = (512, 1280)
"""A small picture is enlarged so that labels fit, a large one is reduced for the page."""
_MAX_LABEL = 40


def colour(entity: int) -> str:
    """``#rrggbb`` of the entity with this index: ten set by hand, then ever new hues (golden ratio)."""
    if entity < len(_COLOURS):
        return _COLOURS[entity]
    red, green, blue = colorsys.hsv_to_rgb(entity * 0.618034 % 1, 0.65, 1)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def ink(background: str) -> str:
    """Black or white, whichever reads better on ``background`` (relative luminance of WCAG, without gamma)."""
    red, green, blue = (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.4 else "#ffffff"


def draw_boxes(image: Image.Image, entities: Sequence[Entity]) -> Image.Image:
    """A copy of ``image`` with every box of ``entities`` and its label. The longer side becomes 512 to 1280 pixels."""
    picture = _scaled(image)
    pen = ImageDraw.Draw(picture)
    width = max(3, max(picture.size) // 200)
    font = _font(max(18, max(picture.size) // 36))
    frames = [
        (index, entity, _frame(box, picture.size)) for index, entity in enumerate(entities) for box in entity.boxes
    ]
    for index, _, frame in frames:
        # a dark line around the coloured one: visible on bright and on dark ground
        pen.rectangle(_grown(frame, 1, picture.size), outline="#101010", width=width + 2)
        pen.rectangle(frame, outline=colour(index), width=width)
    taken: list[Rectangle] = []
    for index, entity, frame in frames:
        if entity.phrase:
            _label(pen, _shortened(entity.phrase), frame, colour(index), font, picture.size, taken)
    return picture


def save_boxes(image: Image.Image, entities: Sequence[Entity], path: Path) -> None:
    """Write the picture with its boxes as PNG: whole or not at all. Raises OutputError when the system refuses."""
    drawn = draw_boxes(image, entities)
    draft = path.with_name(f".{path.name}")
    with writing(path):
        try:
            drawn.save(draft, format="PNG")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """``image`` in RGB, its longer side at most ``side``."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def _scaled(image: Image.Image) -> Image.Image:
    least, most = _LONG_SIDE
    longest = max(image.size)
    factor = min(max(longest, least), most) / longest
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek and Cyrillic letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf", size)


def _frame(box: tuple[int, int, int, int], size: tuple[int, int]) -> Rectangle:
    left, top, right, bottom = to_pixels(box, size)
    return round(left), round(top), min(round(right), size[0] - 1), min(round(bottom), size[1] - 1)


def _grown(frame: Rectangle, by: int, size: tuple[int, int]) -> Rectangle:
    left, top, right, bottom = frame
    return max(0, left - by), max(0, top - by), min(size[0] - 1, right + by), min(size[1] - 1, bottom + by)


def _shortened(phrase: str) -> str:
    return phrase if len(phrase) <= _MAX_LABEL else phrase[: _MAX_LABEL - 1].rstrip() + "…"


def _label(
    pen: ImageDraw.ImageDraw,
    text: str,
    frame: Rectangle,
    background: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: list[Rectangle],
) -> None:
    """Write ``text`` above the box, or in it at its top, or below other labels that stand there."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    margin = max(2, round(font.size / 5))
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = max(0, min(frame[0], size[0] - width))
    wanted = frame[1] - height if frame[1] >= height else frame[1]
    room = max(0, size[1] - height)
    steps = sorted(range(0, room + 1, max(1, height // 4)), key=lambda y: abs(y - wanted))
    free = (y for y in (max(0, min(wanted, room)), *steps) if not _meets((x, y, x + width, y + height), taken))
    y = next(free, max(0, min(wanted, room)))
    taken.append((x, y, x + width, y + height))
    pen.rectangle(taken[-1], fill=background)
    pen.text((x + margin - left, y + margin - top), text, font=font, fill=ink(background))


def _meets(one: Rectangle, others: Sequence[Rectangle]) -> bool:
    return any(one[0] < o[2] and o[0] < one[2] and one[1] < o[3] and o[1] < one[3] for o in others)
