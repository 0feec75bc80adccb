"""Drawn, parametrised faces at 112 px: what a person looks like -> pixels and boxes.

Everything random comes from the generator that is handed over, so a picture is a pure function of
(scene, seed, index). Shapes are polygons in a face's own units (half a face width = 1, y down), moved into the
picture by one affine map; the picture is drawn at twice its size and averaged down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from textures import Colour, any_colour, jitter, shade

SIZE = 112
"""Side of a picture in pixels."""

EXPRESSIONS = ("happy", "sad", "angry", "surprised", "fearful", "disgusted", "neutral", "contempt")
HAIR_COLOURS = ("black", "brown", "blond", "red", "grey")
HAIR_STYLES = ("bald", "short", "long", "curly")
SKIN_TYPES = ("I", "II", "III", "IV", "V", "VI")
POSES = ("frontal", "left", "right")
GAZES = ("ahead", "left", "right")

Points = NDArray[np.float64]

HAIR_RGB: dict[str, Colour] = {
    "black": (24, 20, 24),
    "brown": (92, 50, 18),
    "blond": (232, 196, 92),
    "red": (200, 72, 22),
    "grey": (172, 174, 180),
}
SKIN_RGB: dict[str, Colour] = {
    "I": (255, 229, 216),
    "II": (243, 203, 170),
    "III": (219, 171, 126),
    "IV": (180, 126, 82),
    "V": (138, 90, 60),
    "VI": (74, 46, 34),
}


@dataclass(frozen=True)
class Person:
    """What can be asked about one face. ``hair_colour`` is also the beard's colour."""

    expression: str
    hair_colour: str
    hair_style: str
    skin: str
    glasses: bool
    beard: bool
    pose: str
    gaze: str


@dataclass(frozen=True)
class Scene:
    """One picture: no person (an object, a pattern, a texture), or one to three people from left to right."""

    people: tuple[Person, ...]


Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the picture."""


@dataclass(frozen=True)
class Drawing:
    """A finished picture and, per person, its boxes: face, eyes, mouth and, when worn, glasses."""

    image: Image.Image
    boxes: tuple[dict[str, Box], ...]


@dataclass(frozen=True)
class _Look:
    """Shape of one expression: lids, brows (y of the inner and outer end, up is negative) and kind of mouth."""

    eye_height: float
    brow_inner: float
    brow_outer: float
    mouth: str


_LOOKS = {
    "happy": _Look(0.13, -0.46, -0.44, "smile"),
    "sad": _Look(0.14, -0.56, -0.34, "frown"),
    "angry": _Look(0.12, -0.26, -0.52, "clench"),
    "surprised": _Look(0.23, -0.66, -0.64, "gape"),
    "fearful": _Look(0.23, -0.68, -0.46, "scream"),
    "disgusted": _Look(0.10, -0.30, -0.42, "tongue"),
    "neutral": _Look(0.16, -0.44, -0.43, "line"),
    "contempt": _Look(0.14, -0.42, -0.42, "smirk"),
}

_CIRCLE: Points = np.stack(
    [np.cos(np.linspace(0, 2 * math.pi, 24, False)), np.sin(np.linspace(0, 2 * math.pi, 24, False))], 1
)


def _ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    return _CIRCLE * (rx, ry) + (x, y)


@dataclass
class Face:
    """One face on its way onto the canvas: the affine map, the turn of the head, and the boxes so far."""

    draw: ImageDraw.ImageDraw
    person: Person
    rng: np.random.Generator
    centre: tuple[float, float]
    half_width: float
    roll: float
    turn: float
    stretch: float
    boxes: dict[str, Box] = field(default_factory=dict)

    def place(self, points: Points) -> Points:
        """Face units -> canvas pixels, [N, 2]."""
        cos, sin = math.cos(self.roll) * self.half_width, math.sin(self.roll) * self.half_width
        x, y = points[:, 0], points[:, 1] * self.stretch
        return np.stack([x * cos - y * sin + self.centre[0], x * sin + y * cos + self.centre[1]], 1)

    def turned(self, x: float) -> float:
        """Where a point x of the face's front lands when the head turns: a ball seen from the front."""
        return math.sin(math.asin(max(-0.98, min(0.98, x * 0.9))) + self.turn) / 0.9

    def squeeze(self, x: float) -> float:
        """How much narrower a feature at x gets by the turn, 1 = not at all."""
        return max(0.55, min(1.1, math.cos(math.asin(max(-0.98, min(0.98, x * 0.9))) + self.turn)))

    def fill(self, points: Points, colour: Colour, name: str = "") -> None:
        placed = self.place(points)
        self.draw.polygon(placed.ravel().tolist(), fill=colour)
        self._note(name, placed)

    def stroke(self, points: Points, colour: Colour, width: float, name: str = "", closed: bool = False) -> None:
        placed = self.place(np.concatenate([points, points[:1]]) if closed else points)
        self.draw.line(
            placed.ravel().tolist(), fill=colour, width=max(1, round(width * self.half_width)), joint="curve"
        )
        self._note(name, placed)

    def _note(self, name: str, placed: Points) -> None:
        if not name:
            return
        x1, y1 = placed.min(0).tolist()
        x2, y2 = placed.max(0).tolist()
        if name in self.boxes:
            a, b, c, d = self.boxes[name]
            x1, y1, x2, y2 = min(a, x1), min(b, y1), max(c, x2), max(d, y2)
        self.boxes[name] = (x1, y1, x2, y2)


def _hair_behind(face: Face, hair: Colour) -> None:
    style, rng = face.person.hair_style, face.rng
    if style == "long":
        drop = rng.uniform(1.35, 1.7)
        face.fill(
            np.array(
                [(-1.12, -0.5), (-1.26, drop), (-0.62, drop + 0.1), (0.62, drop + 0.1), (1.26, drop), (1.12, -0.5)]
            ),
            hair,
        )
        face.fill(_ellipse(0, -0.42, 1.18, 1.0), hair)
    elif style == "curly":
        radius = rng.uniform(0.30, 0.38)
        for angle in np.linspace(math.radians(150), math.radians(390), 11):
            x, y = 1.12 * math.cos(angle), -0.34 + 1.06 * math.sin(angle)
            face.fill(_ellipse(x, y, radius, radius), shade(hair, float(rng.uniform(0.8, 1.12))))
    elif style == "short":
        face.fill(_ellipse(0, -0.3, 1.06, 1.06), hair)


def _hair_front(face: Face, hair: Colour, skin: Colour) -> None:
    style, rng = face.person.hair_style, face.rng
    if style == "bald":
        face.fill(_ellipse(face.turn + rng.uniform(-0.2, 0.2), -0.98, 0.22, 0.1), shade(skin, 1.12))
        return
    line = rng.uniform(-0.86, -0.76)
    angles = np.linspace(math.pi * 1.02, math.pi * 1.98, 14)
    top = np.stack([1.05 * np.cos(angles), -0.32 + 1.04 * np.sin(angles)], 1)
    if style == "curly":
        for x in np.linspace(-0.72, 0.72, 6):
            face.fill(_ellipse(float(x), line - 0.12, 0.24, 0.24), shade(hair, float(rng.uniform(0.8, 1.12))))
        return
    if style == "long":
        part = float(rng.uniform(-0.4, 0.4))
        fringe = np.array([(0.92, -0.1), (0.8, line + 0.22), (part, line - 0.1), (-0.8, line + 0.22), (-0.92, -0.1)])
    else:
        fringe = np.array(
            [(0.94, -0.42), (0.74, line + 0.06), (0.3, line), (-0.3, line), (-0.74, line + 0.06), (-0.94, -0.42)]
        )
    face.fill(np.concatenate([top, fringe]), hair)
    face.stroke(fringe, shade(hair, 0.6), 0.05)


def _eye(face: Face, side: int, look: _Look, mirror: int) -> None:
    """side -1 is the viewer's left. Contempt narrows the eye away from the raised brow; sadness sheds a tear."""
    rng, gaze = face.rng, face.person.gaze
    x, squeeze = face.turned(0.42 * side), face.squeeze(0.42 * side)
    height = 0.09 if look.mouth == "smirk" and side != mirror else look.eye_height
    rx, ry = 0.27 * squeeze, height * rng.uniform(0.94, 1.06)
    face.fill(_ellipse(x, -0.14, rx, ry), (250, 250, 248), "eyes")
    offset = {"ahead": 0.0, "left": -0.145, "right": 0.145}[gaze] * squeeze + rng.uniform(-0.012, 0.012)
    iris_y = min(ry, 0.13)
    face.fill(_ellipse(x + offset, -0.14, 0.118 * squeeze, iris_y), _IRIS[int(rng.integers(len(_IRIS)))])
    face.fill(_ellipse(x + offset, -0.14, 0.07 * squeeze, min(iris_y, 0.08)), (8, 8, 10))
    face.stroke(_ellipse(x, -0.14, rx, ry)[12:], (30, 22, 20), 0.05)
    if look.mouth == "frown" and side == mirror:
        face.fill(np.array([(x, 0.06), (x + 0.09, 0.3), (x, 0.38), (x - 0.09, 0.3)]), (150, 205, 250))


_IRIS: tuple[Colour, ...] = ((52, 32, 20), (40, 62, 100), (46, 74, 46), (30, 24, 22))


def _brows(face: Face, look: _Look, colour: Colour, mirror: int) -> None:
    width = float(face.rng.uniform(0.11, 0.15))
    for side in (-1, 1):
        raised = -0.3 if look.mouth == "smirk" and side == mirror else 0.0
        tilt = 0.06 if look.mouth == "smirk" and side != mirror else 0.0
        ends = [
            (face.turned(side * 0.17), look.brow_inner + tilt + raised),
            (face.turned(side * 0.7), look.brow_outer + raised),
        ]
        middle = ((ends[0][0] + ends[1][0]) / 2, (ends[0][1] + ends[1][1]) / 2 - 0.05)
        face.stroke(np.array([ends[0], middle, ends[1]]), colour, width)


def _nose(face: Face, skin: Colour, look: _Look) -> None:
    x, root = face.turned(0.0), face.turned(0.0) * 0.75
    tip = x + 0.55 * math.sin(face.turn)
    dark = shade(skin, 0.72)
    face.fill(np.array([(root, -0.12), (tip + 0.16, 0.3), (tip, 0.36), (tip - 0.16, 0.3)]), shade(skin, 0.88))
    face.stroke(np.array([(tip - 0.15, 0.28), (tip, 0.35), (tip + 0.15, 0.28)]), dark, 0.06)
    if look.mouth == "tongue":
        for height in (-0.16, -0.04):
            face.stroke(
                np.array([(root - 0.13, height + 0.06), (root, height), (root + 0.13, height + 0.06)]),
                shade(skin, 0.55),
                0.05,
            )


def _curve(x: float, y: float, rx: float, bend: float, count: int = 9) -> Points:
    """An arc from x-rx to x+rx through (x, y+bend); its ends are at y."""
    step = np.linspace(-1, 1, count)
    return np.stack([x + rx * step, y + bend * (1 - step**2)], 1)


_DARK: Colour = (52, 14, 18)
_TEETH: Colour = (250, 248, 240)


def _mouth(face: Face, look: _Look, lips: Colour, mirror: int) -> None:
    x, squeeze = face.turned(0.0), face.squeeze(0.0)
    size = float(face.rng.uniform(0.94, 1.08))
    y, wide = 0.66, squeeze * size
    if look.mouth == "smile":
        shape = np.concatenate([_curve(x, y - 0.06, 0.48 * wide, 0.06), _curve(x, y - 0.06, 0.48 * wide, 0.34)[::-1]])
        face.fill(shape, _TEETH, "mouth")
        face.stroke(shape, lips, 0.07, closed=True)
    elif look.mouth == "frown":
        face.stroke(_curve(x, y + 0.18, 0.38 * wide, -0.28), lips, 0.12, "mouth")
    elif look.mouth == "clench":
        shape = np.concatenate([_curve(x, y + 0.02, 0.44 * wide, -0.12), _curve(x, y + 0.2, 0.44 * wide, -0.1)[::-1]])
        face.fill(shape, _TEETH, "mouth")
        face.stroke(shape, _DARK, 0.06, closed=True)
        for step in (-0.22, 0.0, 0.22):
            face.stroke(np.array([(x + step * wide, y - 0.08), (x + step * wide, y + 0.12)]), _DARK, 0.045)
    elif look.mouth == "gape":
        face.fill(_ellipse(x, y + 0.08, 0.24 * wide, 0.31 * size), lips, "mouth")
        face.fill(_ellipse(x, y + 0.08, 0.17 * wide, 0.24 * size), _DARK)
    elif look.mouth == "scream":
        top, bottom = _curve(x, y - 0.02, 0.3 * wide, -0.04), _curve(x, y + 0.26, 0.5 * wide, 0.03)
        face.fill(np.concatenate([top, bottom[::-1]]), _DARK, "mouth")
        face.fill(
            np.concatenate([_curve(x, y + 0.18, 0.4 * wide, 0.0), _curve(x, y + 0.24, 0.44 * wide, 0.0)[::-1]]), _TEETH
        )
        face.stroke(np.concatenate([top, bottom[::-1]]), lips, 0.06, closed=True)
    elif look.mouth == "tongue":
        face.stroke(_curve(x, y + 0.1, 0.4 * wide, -0.16), _DARK, 0.1, "mouth")
        face.fill(_ellipse(x, y + 0.16, 0.17 * wide, 0.2), (226, 92, 110), "mouth")
    elif look.mouth == "line":
        face.stroke(_curve(x, y + 0.04, 0.36 * wide, 0.0), lips, 0.1, "mouth")
    else:
        points = np.array([(-0.34, 0.12), (-0.1, 0.13), (0.14, 0.07), (0.32, -0.08), (0.46, -0.3)]) * (
            mirror * wide,
            1,
        ) + (x, y)
        face.stroke(points, lips, 0.13, "mouth")
        face.stroke(np.array([(0.44, -0.4), (0.55, -0.26), (0.52, -0.12)]) * (mirror * wide, 1) + (x, y), _DARK, 0.05)


def _beard(face: Face, hair: Colour, skin: Colour) -> None:
    """A full beard that leaves the mouth free, so that the mouth's shape stays readable in any hair colour."""
    x = face.turned(0.0) * 0.6
    angles = np.linspace(math.radians(8), math.radians(172), 16)
    outer = np.stack([1.0 * np.cos(angles), 0.1 + 1.24 * np.sin(angles)], 1)
    inner = np.array([(-0.78, 0.3), (-0.58, 0.46), (-0.3, 0.4), (0.0, 0.44), (0.3, 0.4), (0.58, 0.46), (0.78, 0.3)]) + (
        x * 0.6,
        0,
    )
    face.fill(np.concatenate([outer, inner]), shade(hair, 0.86))
    face.fill(_ellipse(face.turned(0.0), 0.7, 0.54 * face.squeeze(0.0), 0.27), skin)


_FRAMES: tuple[Colour, ...] = ((15, 15, 18), (120, 20, 30), (20, 40, 110), (70, 45, 20))


def _glasses(face: Face) -> None:
    """Frames never take a colour close to the skin's."""
    rng = face.rng
    skin = SKIN_RGB[face.person.skin]
    visible = [frame for frame in _FRAMES if sum(abs(a - b) for a, b in zip(frame, skin, strict=True)) > 130]
    frame = visible[int(rng.integers(len(visible)))]
    round_lens, width = rng.random() < 0.5, float(rng.uniform(0.075, 0.1))
    xs = [(face.turned(0.42 * side), face.squeeze(0.42 * side)) for side in (-1, 1)]
    for x, squeeze in xs:
        rx, ry = 0.36 * squeeze, 0.31
        lens = (
            _ellipse(x, -0.14, rx, ry)
            if round_lens
            else np.array([(x - rx, -0.42), (x + rx, -0.42), (x + rx, 0.14), (x - rx, 0.14)])
        )
        face.stroke(lens, frame, width, "glasses", closed=True)
    left, right = xs[0][0] + 0.36 * xs[0][1], xs[1][0] - 0.36 * xs[1][1]
    face.stroke(np.array([(left, -0.18), ((left + right) / 2, -0.24), (right, -0.18)]), frame, width)
    for side, (x, squeeze) in zip((-1, 1), xs, strict=True):
        face.stroke(np.array([(x + side * 0.36 * squeeze, -0.2), (side * 1.0, -0.24)]), frame, width * 0.8)


def draw_person(face: Face) -> None:
    """Back to front: hair, neck, ears, head, beard, nose, mouth, eyes, brows, fringe, glasses."""
    person, rng = face.person, face.rng
    skin = jitter(SKIN_RGB[person.skin], 6, rng)
    hair = jitter(HAIR_RGB[person.hair_colour], 8, rng)
    look, mirror = _LOOKS[person.expression], 1 if rng.random() < 0.5 else -1
    lips = (226, 96, 104) if person.skin in ("V", "VI") else (150, 34, 44)  # far from the skin in lightness
    _hair_behind(face, hair)
    face.fill(np.array([(-0.36, 0.7), (-0.38, 1.9), (0.38, 1.9), (0.36, 0.7)]), shade(skin, 0.84))
    face.fill(_ellipse(0, 2.35, rng.uniform(1.35, 1.75), 0.9), any_colour(rng))
    for side in (-1, 1):
        if side * face.turn < 0.2:
            face.fill(_ellipse(side * 1.0 - 0.18 * math.sin(face.turn) * side, 0.02, 0.16, 0.24), shade(skin, 0.9))
    head = np.stack([_CIRCLE[:, 0], _CIRCLE[:, 1] * np.where(_CIRCLE[:, 1] > 0, 1.3, 1.22) - 0.0], 1)
    face.fill(head, skin, "face")
    face.stroke(head, shade(skin, 0.7), 0.035, closed=True)
    if person.beard:
        _beard(face, hair, skin)
    _nose(face, skin, look)
    _mouth(face, look, lips, mirror)
    for side in (-1, 1):
        _eye(face, side, look, mirror)
    _brows(face, look, shade(hair, 0.7) if person.hair_colour != "black" else (14, 12, 14), mirror)
    _hair_front(face, hair, skin)
    if person.glasses:
        _glasses(face)
