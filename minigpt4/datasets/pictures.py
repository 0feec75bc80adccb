"""Where a record's pictures lie, and what tells one from another without decoding it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from minigpt4.common.errors import DataError
from minigpt4.datasets.stored import StoredImage

KEY_BYTES = 16


class ByteReader(Protocol):
    """Reads a part of a file."""

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on. Raises DataError."""


@dataclass(frozen=True, slots=True)
class TarImage:
    """A picture's place in a tar file. ``key``: its name, for messages."""

    tar: Path
    offset: int
    size: int
    key: str
    files: ByteReader = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.key

    def read(self) -> bytes:
        """The encoded picture. Raises DataError."""
        return self.files.read(self.tar, self.offset, self.size)

    def open(self) -> io.BytesIO:
        """The encoded picture as a stream."""
        return io.BytesIO(self.read())


@dataclass(frozen=True, slots=True)
class HeldImage:
    """An encoded picture in memory. ``key``: its name, for messages."""

    content: bytes
    key: str

    def __str__(self) -> str:
        return self.key

    def read(self) -> bytes:
        """The encoded picture."""
        return self.content

    def open(self) -> io.BytesIO:
        """The encoded picture as a stream."""
        return io.BytesIO(self.content)


ImageSource = Path | StoredImage | TarImage | HeldImage


def encoded(source: ImageSource) -> bytes:
    """The picture as it is stored. Raises DataError that names it."""
    if not isinstance(source, Path):
        return source.read()
    try:
        return source.read_bytes()
    except OSError as error:
        raise DataError(f"image '{source}' cannot be read: {error.strerror}") from error


def content_key(content: bytes) -> bytes:
    """The same for the same encoded picture, wherever it lies."""
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def source_key(source: ImageSource) -> bytes:
    """The same for the same place as long as its file has the same size and modification time. Raises DataError."""
    parts: list[object]
    if isinstance(source, Path):
        parts = [*_version(source)]
    elif isinstance(source, TarImage):
        parts = [*_version(source.tar), source.offset, source.size]
    elif isinstance(source, HeldImage):
        return content_key(source.content)
    else:
        parts = [*_version(Path(source.file)), source.column, source.row, source.position]
        beside = Path(source.file).parent / source.name
        if source.name and beside.is_file():  # a cell without bytes names a file
            parts += _version(beside)
    return content_key("\0".join(map(str, parts)).encode())


def _version(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"image '{path}' cannot be read: {error.strerror}") from error
    return str(path.absolute()), found.st_size, found.st_mtime_ns


def open_image(source: Any, name: str = "", decode: bool = True) -> Image.Image:
    """A picture from a path, a stream, a table, a tar or memory; without ``decode`` its size alone.

    Raises DataError that names it.
    """
    if isinstance(source, (StoredImage, TarImage, HeldImage)):
        name, source = str(source), source.open()
    try:
        with Image.open(source) as image:
            if decode:
                image.load()
            return image
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image '{name or source}' cannot be read: {' '.join(str(error).split())}") from error


def open_encoded(source: ImageSource) -> Image.Image:
    """A picture whose size is known and whose file is in memory, not decoded. Raises DataError that names it."""
    content = encoded(source)
    try:
        return Image.open(io.BytesIO(content))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"image '{source}' cannot be read: {' '.join(str(error).split())}") from error
