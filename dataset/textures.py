"""Colours and noise that drawings share."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Colour = tuple[int, int, int]
"""Red, green, blue, 0..255."""


def shade(colour: Sequence[float], factor: float) -> Colour:
    """Darker (factor < 1) or lighter."""
    red, green, blue = (max(0, min(255, int(channel * factor))) for channel in colour)
    return red, green, blue


def jitter(colour: Colour, amount: float, rng: np.random.Generator) -> Colour:
    """Every channel moved by at most ``amount``."""
    red, green, blue = (
        max(0, min(255, int(c + d))) for c, d in zip(colour, rng.uniform(-amount, amount, 3), strict=True)
    )
    return red, green, blue


def any_colour(rng: np.random.Generator) -> Colour:
    """Any but the very dark and the very light ones."""
    red, green, blue = rng.integers(10, 246, 3).tolist()
    return red, green, blue


@functools.cache
def _textures() -> NDArray[np.float32]:
    """Sixteen fixed noise fields at several scales, [16, 256, 256], mean 0, deviation 1."""
    rng = np.random.default_rng(20240501)
    fields = []
    for index in range(16):
        total = np.zeros((256, 256), np.float32)
        for octave in range(2 + index % 3, 8):
            cells = 2**octave
            grid = rng.standard_normal((cells, cells)).astype(np.float32)
            smooth = Image.fromarray(grid).resize((256, 256), Image.Resampling.BICUBIC)
            total += np.asarray(smooth) * (0.5 + 0.1 * (index % 4)) ** octave
        fields.append((total - total.mean()) / total.std())
    return np.stack(fields)


@functools.cache
def grain() -> NDArray[np.int16]:
    """One fixed sheet of unit noise in 1/64 steps, [512, 512]."""
    return (np.random.default_rng(7).standard_normal((512, 512)) * 64).astype(np.int16)


def texture(rng: np.random.Generator, size: int, contrast: float) -> Image.Image:
    """A patch of cloudy texture between two random colours, RGB, ``size`` x ``size``."""
    sheet = _textures()[int(rng.integers(16))]
    x, y = rng.integers(0, 256 - size // 2, 2).tolist()
    patch = np.clip(128 + contrast * 64 * sheet[y : y + size // 2, x : x + size // 2], 0, 255).astype(np.uint8)
    image = Image.fromarray(patch).resize((size, size), Image.Resampling.BILINEAR)
    first, second = np.array(any_colour(rng)), np.array(any_colour(rng))
    ramp = np.linspace(0, 1, 256)
    table = np.concatenate([first[c] + (second[c] - first[c]) * ramp for c in range(3)]).astype(int).tolist()
    return Image.merge("RGB", [image] * 3).point(table)
