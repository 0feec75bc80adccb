"""Faces made unrecognisable: coarse squares over what OpenCV's cascades find, or over the whole picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from PIL import Image

_SQUARES = 8
"""Squares along the longer side of what is covered: too few for eyes and mouth."""
_MARGIN = 0.3
"""A cascade's box ends at the brows and the chin; so much is added on every side."""
_CASCADES = ("haarcascade_frontalface_default.xml", "haarcascade_profileface.xml")


class Blur:
    """Covers faces, or the whole picture where none is found or nobody can look; counts what it did."""

    def __init__(self, is_whole: bool = False) -> None:
        """is_whole: always the whole picture."""
        self.num_faces = self.num_whole = 0
        self._cv2: Any = None
        self._reason = "asked for"
        self._cascades: list[Any] = []
        if not is_whole:
            self._find_cascades()

    def apply(self, image: Image.Image) -> Image.Image:
        """A new picture without recognisable faces."""
        boxes = self._faces(image)
        covered = image.copy()
        for box in boxes or [(0, 0, *image.size)]:
            part = image.crop(box)
            scale = _SQUARES / max(part.size)
            small = part.resize(
                (max(1, round(part.width * scale)), max(1, round(part.height * scale))), Image.Resampling.BOX
            )
            covered.paste(small.resize(part.size, Image.Resampling.NEAREST), box[:2])
        self.num_faces += bool(boxes)
        self.num_whole += not boxes
        return covered

    def describe(self) -> str:
        """What was done, for the reader of the page."""
        if not self._cascades:
            return f"{self.num_whole} pictures are blurred as a whole ({self._reason})."
        return (
            f"Faces are blurred where OpenCV found them ({self.num_faces} pictures), else the whole picture "
            f"({self.num_whole}). A detector misses faces: look at every picture before you pass this page on, or use "
            "--blur-faces whole."
        )

    def _find_cascades(self) -> None:
        try:
            cv2: Any = importlib.import_module("cv2")
        except ImportError:
            self._reason = "OpenCV is not installed, so faces could not be looked for"
            return
        if not hasattr(cv2, "CascadeClassifier"):  # version 5 dropped them
            self._reason = f"OpenCV {cv2.__version__} has no face cascades"
            return
        found = [cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / name)) for name in _CASCADES]
        self._cascades = [cascade for cascade in found if not cascade.empty()]
        self._cv2, self._reason = cv2, "OpenCV's face cascades are missing"

    def _faces(self, image: Image.Image) -> list[tuple[int, int, int, int]]:
        """Left, top, right, bottom of every face, with a margin; profiles are looked for on both sides."""
        if not self._cascades:
            return []
        import numpy as np

        grey = np.asarray(image.convert("L"))
        boxes = []
        for cascade in self._cascades:
            for is_mirrored in (False, True):
                view = np.ascontiguousarray(grey[:, ::-1]) if is_mirrored else grey
                for x, y, width, height in cascade.detectMultiScale(view, 1.1, 4):
                    left = image.width - x - width if is_mirrored else x
                    boxes.append(_widened(int(left), int(y), int(width), int(height), image.size))
        return boxes


def _widened(x: int, y: int, width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    across, down = round(width * _MARGIN), round(height * _MARGIN)
    return max(0, x - across), max(0, y - down), min(size[0], x + width + across), min(size[1], y + height + down)
