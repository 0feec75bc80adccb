"""Backgrounds, pictures without people, and the composition of a whole scene."""

from __future__ import annotations

import math

import face_drawing as fd
import numpy as np
from face_drawing import SIZE, Box, Drawing, Face, Person, Scene, draw_person
from PIL import Image, ImageDraw
from textures import any_colour, grain, jitter, shade, texture

_CANVAS = SIZE * 2


def _background(rng: np.random.Generator) -> Image.Image:
    kind = int(rng.integers(6))
    if kind <= 1:
        return Image.new("RGB", (_CANVAS, _CANVAS), any_colour(rng))
    if kind == 2:
        return texture(rng, _CANVAS, float(rng.uniform(0.3, 1.2)))
    image = Image.new("RGB", (_CANVAS, _CANVAS), any_colour(rng))
    draw = ImageDraw.Draw(image)
    if kind == 3:
        _stripes(draw, rng)
    elif kind == 4:
        _blobs(draw, rng, int(rng.integers(3, 9)))
    else:
        _room(draw, rng)
    return image


def _stripes(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    colour, width = any_colour(rng), int(rng.integers(10, 44))
    slope = float(rng.uniform(-1, 1)) * _CANVAS
    for start in range(-_CANVAS, 2 * _CANVAS, 2 * width):
        if rng.random() < 0.97:
            draw.polygon(
                [(start, 0), (start + width, 0), (start + width + slope, _CANVAS), (start + slope, _CANVAS)],
                fill=colour,
            )


def _checks(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    colour, step = any_colour(rng), int(rng.integers(16, 60))
    shift = int(rng.integers(step))
    for row in range(-1, _CANVAS // step + 1):
        for column in range(row % 2 - 1, _CANVAS // step + 1, 2):
            x, y = column * step + shift, row * step + shift
            draw.rectangle((x, y, x + step, y + step), fill=colour)


def _blobs(draw: ImageDraw.ImageDraw, rng: np.random.Generator, count: int) -> None:
    for _ in range(count):
        x, y = rng.uniform(0, _CANVAS, 2).tolist()
        rx, ry = rng.uniform(8, 70, 2).tolist()
        shape = int(rng.integers(3))
        if shape == 0:
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=any_colour(rng))
        elif shape == 1:
            draw.rectangle((x - rx, y - ry, x + rx, y + ry), fill=any_colour(rng))
        else:
            draw.polygon([(x - rx, y + ry), (x, y - ry), (x + rx, y + ry)], fill=any_colour(rng))


def _room(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    floor = int(rng.uniform(0.5, 0.85) * _CANVAS)
    draw.rectangle((0, floor, _CANVAS, _CANVAS), fill=any_colour(rng))
    x, width = int(rng.uniform(0, 0.8) * _CANVAS), int(rng.uniform(0.15, 0.4) * _CANVAS)
    draw.rectangle((x, 20, x + width, floor - 30), fill=any_colour(rng), outline=any_colour(rng), width=5)


def _house(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y, w, h = _place(rng)
    draw.rectangle((x - w, y - h * 0.3, x + w, y + h), fill=any_colour(rng))
    draw.polygon([(x - w * 1.15, y - h * 0.3), (x, y - h), (x + w * 1.15, y - h * 0.3)], fill=any_colour(rng))
    draw.rectangle((x - w * 0.2, y + h * 0.3, x + w * 0.2, y + h), fill=any_colour(rng))
    window = any_colour(rng)
    for side in (-0.65, 0.65)[: int(rng.integers(1, 3))]:
        draw.rectangle((x + w * side - w * 0.18, y - h * 0.1, x + w * side + w * 0.18, y + h * 0.2), fill=window)


def _tree(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y, w, h = _place(rng)
    draw.rectangle((x - w * 0.13, y, x + w * 0.13, y + h), fill=jitter((104, 70, 40), 20, rng))
    leaf = jitter((60, 130, 50), 50, rng)
    for _ in range(7):
        a, b = rng.uniform(-0.5, 0.5, 2).tolist()
        draw.ellipse(
            (x + (a - 0.45) * w, y + (b - 0.9) * h, x + (a + 0.45) * w, y + b * h),
            fill=shade(leaf, float(rng.uniform(0.8, 1.2))),
        )


def _cup(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y, w, h = _place(rng)
    colour = any_colour(rng)
    draw.ellipse((x + w * 0.4, y - h * 0.4, x + w * 1.1, y + h * 0.4), outline=colour, width=int(w * 0.16) + 2)
    draw.polygon(
        [
            (x - w * 0.7, y - h * 0.7),
            (x + w * 0.7, y - h * 0.7),
            (x + w * 0.5, y + h * 0.8),
            (x - w * 0.5, y + h * 0.8),
        ],
        fill=colour,
    )
    draw.ellipse((x - w * 0.7, y - h * 0.9, x + w * 0.7, y - h * 0.5), fill=shade(colour, 0.5))


def _ball(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y, w, _ = _place(rng)
    skin = list(fd.SKIN_RGB.values())[int(rng.integers(6))]
    colour = skin if rng.random() < 0.5 else any_colour(rng)
    draw.ellipse((x - w, y - w, x + w, y + w), fill=colour, outline=shade(colour, 0.6), width=4)
    if rng.random() < 0.6:
        draw.arc(
            (x - w * 0.6, y - w, x + w * 1.6, y + w), 110, 250, fill=any_colour(rng), width=int(rng.integers(3, 14))
        )


def _car(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y, w, h = _place(rng)
    colour = any_colour(rng)
    draw.rectangle((x - w * 1.2, y, x + w * 1.2, y + h * 0.4), fill=colour)
    draw.polygon(
        [(x - w * 0.7, y), (x - w * 0.4, y - h * 0.4), (x + w * 0.4, y - h * 0.4), (x + w * 0.8, y)],
        fill=shade(colour, 0.8),
    )
    for side in (-0.7, 0.7):
        draw.ellipse(
            (x + w * (side - 0.25), y + h * 0.2, x + w * (side + 0.25), y + h * 0.2 + w * 0.5), fill=(25, 25, 28)
        )


def _flower(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    x, y, w, h = _place(rng)
    draw.line((x, y, x + w * 0.2, y + h * 2), fill=(50, 110, 45), width=8)
    petal, count = any_colour(rng), int(rng.integers(5, 9))
    for index in range(count):
        a, b = x + w * 0.6 * math.cos(2 * math.pi * index / count), y + w * 0.6 * math.sin(2 * math.pi * index / count)
        draw.ellipse((a - w * 0.35, b - w * 0.35, a + w * 0.35, b + w * 0.35), fill=petal)
    draw.ellipse((x - w * 0.3, y - w * 0.3, x + w * 0.3, y + w * 0.3), fill=any_colour(rng))


def _lines(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(3, 25))):
        draw.line(rng.uniform(0, _CANVAS, 4).tolist(), fill=any_colour(rng), width=int(rng.integers(1, 16)))


def _place(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Centre and half sizes of an object."""
    x, y = (rng.uniform(0.3, 0.7, 2) * _CANVAS).tolist()
    w, h = (rng.uniform(0.16, 0.4, 2) * _CANVAS).tolist()
    return x, y, w, h


_OBJECTS = (_house, _tree, _cup, _ball, _car, _flower, _checks, _lines, _stripes)


def _object_picture(rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.15:
        return texture(rng, _CANVAS, float(rng.uniform(0.5, 1.6)))
    image = _background(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(1 if rng.random() < 0.65 else 2):
        _OBJECTS[int(rng.integers(len(_OBJECTS)))](draw, rng)
    if rng.random() < 0.2:
        _blobs(draw, rng, int(rng.integers(1, 4)))
    return image


def _placed_face(draw: ImageDraw.ImageDraw, person: Person, slot: int, count: int, rng: np.random.Generator) -> Face:
    if count == 1:
        half_width = float(rng.uniform(0.225, 0.305))
        x, y = 0.5 + float(rng.uniform(-0.1, 0.1)), 0.48 + float(rng.uniform(-0.05, 0.07))
    else:
        half_width = float(rng.uniform(0.125, 0.165) if count == 2 else rng.uniform(0.095, 0.12))
        x = (slot + 0.5) / count + float(rng.uniform(-0.03, 0.03))
        y = 0.5 + float(rng.uniform(-0.14, 0.14))
    turn = {"frontal": 0.0, "left": -0.46, "right": 0.46}[person.pose] + float(rng.uniform(-0.06, 0.06))
    return Face(
        draw=draw,
        person=person,
        rng=rng,
        centre=(x * _CANVAS, y * _CANVAS),
        half_width=half_width * _CANVAS,
        roll=float(rng.normal(0, 0.06)),
        turn=turn,
        stretch=float(rng.uniform(0.94, 1.08)),
    )


def _light_and_grain(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A light that falls off across the picture, a slight cast, and sensor grain."""
    pixels = np.asarray(image).astype(np.float32)
    ramp = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    across, down = rng.uniform(-0.14, 0.14, 2)
    light = (float(rng.uniform(0.94, 1.05)) + across * ramp[None, :] + down * ramp[:, None]).astype(np.float32)
    pixels *= light[..., None]
    x, y = rng.integers(0, 512 - SIZE, 2).tolist()
    pixels += (grain()[y : y + SIZE, x : x + SIZE] * (float(rng.uniform(0, 7)) / 64))[..., None].astype(np.float32)
    pixels += rng.uniform(-5, 5, 3).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_scene(scene: Scene, rng: np.random.Generator) -> Drawing:
    """One picture of ``SIZE`` x ``SIZE`` pixels, RGB, with its boxes (in pixels, not clipped to the picture)."""
    boxes: list[dict[str, Box]] = []
    if scene.people:
        image = _background(rng)
        draw = ImageDraw.Draw(image)
        for slot, person in enumerate(scene.people):
            face = _placed_face(draw, person, slot, len(scene.people), rng)
            draw_person(face)
            boxes.append({name: (a / 2, b / 2, c / 2, d / 2) for name, (a, b, c, d) in face.boxes.items()})
    else:
        image = _object_picture(rng)
    return Drawing(_light_and_grain(image.reduce(2), rng), tuple(boxes))


def random_person(rng: np.random.Generator) -> Person:
    """Every attribute drawn uniformly and on its own."""
    return Person(
        expression=fd.EXPRESSIONS[int(rng.integers(len(fd.EXPRESSIONS)))],
        hair_colour=fd.HAIR_COLOURS[int(rng.integers(len(fd.HAIR_COLOURS)))],
        hair_style=fd.HAIR_STYLES[int(rng.integers(len(fd.HAIR_STYLES)))],
        skin=fd.SKIN_TYPES[int(rng.integers(len(fd.SKIN_TYPES)))],
        glasses=bool(rng.random() < 0.5),
        beard=bool(rng.random() < 0.5),
        pose=fd.POSES[int(rng.integers(len(fd.POSES)))],
        gaze=fd.GAZES[int(rng.integers(len(fd.GAZES)))],
    )
