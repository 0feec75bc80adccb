"""Pictures of a request: data URLs, and files below a folder that the server was given. Nothing is downloaded."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image, UnidentifiedImageError

from minigpt4.serve.errors import ApiError, shown

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names of what is read; its other readers stay closed to strangers."""


@dataclass(frozen=True)
class PictureLimits:
    """root: the folder files may be read from, resolved; None = no files. max_bytes: of a file. max_pixels: of one."""

    root: Path | None = None
    max_bytes: int = 16_000_000
    max_pixels: int = 40_000_000


def read_picture(url: str, limits: PictureLimits) -> Image.Image:
    """A decoded picture. Raises ApiError: 413 for too large ones, 400 for what is not allowed or not readable."""
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _decode(_data(url, limits), limits)
    if scheme in ("http", "https"):
        raise _refused("picture links are not followed: send the picture as data:image/png;base64,...")
    return _decode(_file(url, limits), limits)


def _refused(message: str) -> ApiError:
    return ApiError(400, f"image_url: {message}", "image_url", "invalid_image_url")


def _too_large(message: str) -> ApiError:
    return ApiError(413, f"image_url: {message}", "image_url", "image_too_large")


def _data(url: str, limits: PictureLimits) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused(f"a data URL must be data:image/...;base64,..., got {shown(url)}")
    if len(text) * 3 // 4 > limits.max_bytes + 2:
        raise _too_large(f"the picture has about {len(text) * 3 // 4} bytes, allowed are {limits.max_bytes}")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"the data is not base64 ({error})") from error


def _file(url: str, limits: PictureLimits) -> bytes:
    """The bytes of a file below the root; a link or a ``..`` that leads out of it is refused like a missing file."""
    if limits.root is None:
        raise _refused(f"{shown(url)}: this server reads no files (it was started without --image-root)")
    path = url
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise _refused(f"{shown(url)}: a file of another machine; write file:///path")
        path = unquote(parts.path)
    try:
        file = (limits.root / path).resolve(strict=True)
        if not file.is_relative_to(limits.root) or not file.is_file():
            raise FileNotFoundError
        if file.stat().st_size > limits.max_bytes:
            raise _too_large(f"the file has {file.stat().st_size} bytes, allowed are {limits.max_bytes}")
        return file.read_bytes()
    # ValueError: a path with a null character. RuntimeError: links in a circle.
    except (OSError, ValueError, RuntimeError) as error:
        raise _refused(f"{shown(url)}: no readable file below the server's --image-root") from error


def _decode(content: bytes, limits: PictureLimits) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > limits.max_pixels:
            raise _too_large(f"{width} x {height} pixels, allowed are {limits.max_pixels} in all")
        image.load()
    except Image.DecompressionBombError as error:
        raise _too_large(str(error)) from error
    # Pillow's readers raise SyntaxError and ValueError for broken chunks.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise _refused(f"not readable as a picture ({', '.join(FORMATS)})") from error
    return image
