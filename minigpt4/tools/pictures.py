"""A picture of a conversation, for reports and pages."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path


def draw_chat(image: Path, turns: Sequence[tuple[str, str]], path: Path) -> None:
    """Write a PNG with the picture on the left and its questions and answers on the right, atomically."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 3.4), facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    left.imshow(Image.open(image))
    for axes in (left, right):
        axes.axis("off")
    height = 0.97
    for question, answer in turns:
        for text, colour, indent in ((question, "#1f4e8c", 0.0), (answer, "#202020", 0.04)):
            lines = textwrap.wrap(text, 62)
            right.text(indent, height, "\n".join(lines), color=colour, fontsize=11, va="top", transform=right.transAxes)
            height -= 0.085 * len(lines) + 0.015
        height -= 0.05
    figure.tight_layout()
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png", dpi=110)
    os.replace(draft, path)
