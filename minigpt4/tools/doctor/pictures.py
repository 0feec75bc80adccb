"""What is wrong with a picture file: from its head, from its end, or from all of its pixels."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

TINY = 32
"""Pixels; a shorter side is a note of trouble."""
HUGE = 64_000_000
LONG = 5.0
_BROKEN = (OSError, ValueError, SyntaxError)
_ORIENTATION = 0x0112
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_FLAT = 6
"""Grey levels; a picture with less contrast has no pattern to compare."""


@dataclass(frozen=True)
class Picture:
    """size: (width, height) as stored, None when it cannot be told. problems: id of a check and a detail.

    content: hash of the file, empty when not asked for. pattern: difference hash, None when not asked for or flat.
    """

    size: tuple[int, int] | None
    problems: tuple[tuple[str, str], ...]
    content: bytes = b""
    pattern: int | None = None


def examine_picture(source: Path | bytes, decode: bool, compare: bool) -> Picture:
    """Looks at head and end of a picture; at all of it with ``decode``, or where the end is not the usual one.

    ``compare`` also makes both hashes.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
            return _examine(stream, decode, compare)
    except OSError as error:
        return Picture(None, (("image-unreadable", error.strerror or str(error)),))


def _examine(stream: IO[bytes], decode: bool, compare: bool) -> Picture:
    length = stream.seek(0, io.SEEK_END)
    if length == 0:
        return Picture(None, (("image-empty", "0 bytes"),))
    stream.seek(0)
    content = hashlib.blake2b(stream.read(), digest_size=16).digest() if compare else b""
    stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream)
    except Image.DecompressionBombError as error:
        return Picture(None, (("image-bomb", _line(error)),), content)
    except UnidentifiedImageError:  # its text names a Python object
        return Picture(None, (("image-unreadable", "not a known picture format"),), content)
    except _BROKEN as error:
        return Picture(None, (("image-unreadable", _line(error)),), content)
    problems = _of_head(image)
    size, pattern = image.size, None
    # A usual end costs two reads. Only a file without it is decoded whole: some programs write something behind.
    if decode or compare or not _ends_well(stream, image.format, length):
        try:
            _decode(image)
            pattern = difference_hash(image) if compare else None
        except (*_BROKEN, Image.DecompressionBombError) as error:
            problems.append(("image-truncated", _line(error)))
    return Picture(size, tuple(problems), content, pattern)


def _of_head(image: Image.Image) -> list[tuple[str, str]]:
    width, height = image.size
    size, problems = f"{width} x {height}", []
    if width * height > HUGE:
        problems.append(("image-huge", size))
    if min(width, height) < TINY:
        problems.append(("image-tiny", size))
    if max(width, height) > LONG * min(width, height):
        problems.append(("image-aspect", size))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        problems.append(("image-alpha", f"mode {image.mode}"))
    elif image.mode == "P":
        problems.append(("image-palette", "mode P"))
    elif image.mode == "CMYK":
        problems.append(("image-cmyk", "mode CMYK"))
    elif image.mode in _DEEP:
        problems.append(("image-16bit", f"mode {image.mode}"))
    if "exif" in image.info:  # getexif would look into the pixels of some formats
        orientation = image.getexif().get(_ORIENTATION, 1)
        if orientation not in (0, 1):
            problems.append(("image-rotated", f"orientation {orientation}"))
    return problems


def _ends_well(stream: IO[bytes], kind: str | None, length: int) -> bool:
    """Whether the last bytes are those a whole file of this kind ends with; True for other kinds: Pillow
    looks at the end of a WebP file itself."""
    if kind not in ("JPEG", "MPO", "PNG"):
        return True
    stream.seek(max(0, length - 8))
    end = stream.read(8)
    return end[:4] == b"IEND" if kind == "PNG" else end[-2:] == b"\xff\xd9"


def _decode(image: Image.Image) -> None:
    """Reads the pixels to their end; of a JPEG an eighth of the resolution is enough to see that it is whole."""
    if image.format == "JPEG":
        image.draft("L", (72, 64))
    image.load()


def difference_hash(image: Image.Image) -> int | None:
    """64 bits: is a pixel of the picture, shrunk to 9 x 8 grey ones, brighter than its left neighbour? None when flat.

    Pictures that were scaled, recompressed or slightly changed in colour differ in few bits (N. Krawetz, dHash).
    """
    small = image.resize((72, 64), Image.Resampling.BOX)  # first: converting a large picture takes its memory twice
    grey = small.convert("RGB").convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(grey, dtype=np.int16)  # [8, 9]
    if int(pixels.max()) - int(pixels.min()) < _FLAT:
        return None
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
