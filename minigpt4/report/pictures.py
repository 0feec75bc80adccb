"""Pictures inside a page: small JPEGs as data URLs, counted, with faces made unrecognisable where asked."""

from __future__ import annotations

import base64
import io
import time
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from minigpt4.report.blur import Blur

SIDE = 256
"""Longer side of a picture in a report, in pixels."""
_OPENED = 640
_QUALITY = 72


def open_small(path: str | Path, side: int) -> Image.Image | None:
    """A picture of at most ``side`` pixels, upright, in RGB; None when there is none or it cannot be read."""
    if not path or not Path(path).is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.draft("RGB", (side, side))
                image.thumbnail((side, side))
                upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    upright.info.clear()  # a comment in the file is not for the page
    return upright


def jpeg_url(image: Image.Image, quality: int = 75) -> str:
    """The picture as a data URL."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


class Album:
    """The pictures of one report. Attributes tell how many went in, were left out and could not be read."""

    def __init__(self, max_bytes: int, blur: Blur | None = None, max_seconds: float | None = None) -> None:
        """max_seconds: processor time after which no more pictures are read."""
        self.blur = blur
        self.shown = self.left_out = self.unreadable = 0
        self._room, self._seconds = max_bytes, max_seconds
        self._begun = time.thread_time()

    def url(self, path: Path) -> str:
        """A data URL, or '' when the file cannot be read, or the report holds enough."""
        if self._room <= 0 or (self._seconds is not None and time.thread_time() - self._begun > self._seconds):
            self.left_out += 1
            return ""
        image = open_small(path, _OPENED if self.blur else SIDE)
        if image is None:
            self.unreadable += 1
            return ""
        if self.blur:
            image = self.blur.apply(image)
            image.thumbnail((SIDE, SIDE))
        found = jpeg_url(image, _QUALITY)
        if len(found) > self._room:
            self._room = 0
            self.left_out += 1
            return ""
        self._room -= len(found)
        self.shown += 1
        return found
