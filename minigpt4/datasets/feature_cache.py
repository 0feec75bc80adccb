"""Frozen vision features in files that any number of processes read and append to at the same time.

``<root>/<space>/space.json`` says what the features are; every writer has files of its own beside it: ``*.rows`` holds
rows of equal size, ``*.index`` one record per row, written after the row has reached the disk. So nothing needs a lock,
and what a killed writer leaves unfinished is in no index. ``<root>/pictures/*.names`` remembers the content of files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt4.common.errors import DataError
from minigpt4.common.files import write_atomically
from minigpt4.datasets.pictures import KEY_BYTES, content_key

log = logging.getLogger(__name__)

LAYOUT = 1
SPACE = "space.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}
_STORED = {4: (np.int32, torch.int32), 2: (np.int16, torch.int16), 1: (np.uint8, torch.uint8)}
"""Numbers of the same width for numpy, which does not know bfloat16."""

_INDEX = struct.Struct(f"<{KEY_BYTES}sII")  # key, number of the row, CRC-32 of the row
_NAME = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}s")  # key of a place, key of the content found there
_SHARD_BYTES = 4 << 30
_COMMIT_BYTES, _COMMIT_S = 64 << 20, 5.0
"""What a killed build loses at most."""


@dataclass(frozen=True)
class Space:
    """What makes rows exchangeable. shape: (P, C') of features, (3, S, S) of pictures as bytes.

    ``about`` decides, ``notes`` are for people.
    """

    shape: tuple[int, ...]
    dtype: str
    about: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the folder: a hash of everything but the notes."""
        text = json.dumps([LAYOUT, self.shape, self.dtype, sorted(self.about.items())])
        return content_key(text.encode()).hex()

    @property
    def row_bytes(self) -> int:
        """Size of one picture."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Features(Protocol):
    """Rows by content of their pictures, in memory or on disk."""

    @property
    def space(self) -> Space:
        """What the rows are."""

    def place(self, key: bytes) -> int:
        """Where the row of a content lies; -1 where there is none."""

    def has(self, key: bytes) -> bool:
        """Whether a row is there, or was added."""

    def add(self, key: bytes, features: Tensor) -> None:
        """Keep features [P, C'] that are not there yet. Raises DataError when the disk is full."""

    def close(self) -> None:
        """After the last ``add``: what was added can be read."""

    def rows(self) -> Rows:
        """Reads rows; travels to loader workers."""


class Rows(Protocol):
    """A row by its place."""

    def __call__(self, place: int, /) -> Tensor:
        """Features [P, C'], not shared with the store."""


class MemoryFeatures:
    """Rows of this process and of the loader workers forked from it."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._places: dict[bytes, int] = {}
        self._tensors: list[Tensor] = []

    def place(self, key: bytes) -> int:
        """See Features."""
        return self._places.get(key, -1)

    def has(self, key: bytes) -> bool:
        """See Features."""
        return key in self._places

    def add(self, key: bytes, features: Tensor) -> None:
        """See Features."""
        self._places[key] = len(self._tensors)
        self._tensors.append(features.clone())

    def close(self) -> None:
        """See Features."""

    def rows(self) -> Rows:
        """See Features."""
        return self._tensors.__getitem__


class FeatureStore:
    """One space on disk. Entries of all writers that had committed at the last ``refresh``."""

    def __init__(self, root: Path, space: Space) -> None:
        self.space, self.folder = space, root / space.key
        self.lost = 0  # rows that an index promises and files that were cut off do not hold
        self._places: dict[bytes, int] = {}
        self._checksums: dict[int, int] = {}
        self._files: list[Path] = []
        self._read: dict[Path, int] = {}
        self._writer: FeatureWriter | None = None
        self._added: set[bytes] = set()
        self.refreshed = 0.0  # when what others have written was read
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None, "_added": set()}  # a copy in a worker writes a file of its own

    def refresh(self) -> None:
        """Reads what was committed since."""
        self.refreshed = time.monotonic()
        lost: dict[bytes, Path] = {}
        for path in sorted(self.folder.glob("*.index")):
            rows = path.with_suffix(".rows")
            if rows not in self._files:
                self._files.append(rows)
            number = self._files.index(rows)
            found = list(_records(path, _INDEX, self._read))
            if not found:
                continue
            whole = rows.stat().st_size // self.space.row_bytes if rows.is_file() else 0
            for key, row, checksum in found:
                if row >= whole:
                    lost[key] = rows
                elif key not in self._places:
                    self._places[key] = number << 32 | row
                    self._checksums[self._places[key]] = checksum
        gone = [path for key, path in lost.items() if key not in self._places]
        self.lost += len(gone)
        if gone:
            log.warning("%s is cut off: %d pictures are lost and will be computed again", gone[0], len(gone))

    def place(self, key: bytes) -> int:
        """See Features."""
        return self._places.get(key, -1)

    def has(self, key: bytes) -> bool:
        """See Features. Looks now and then at what others have written."""
        if time.monotonic() - self.refreshed > 2 * _COMMIT_S:
            self.refresh()
        return key in self._places or key in self._added

    def add(self, key: bytes, features: Tensor) -> None:
        """See Features. Others see it after ``close`` or a while."""
        if self._writer is None or self._writer.pid != os.getpid():  # a forked worker has its parent's
            self._writer = FeatureWriter(self.folder, self.space)
        self._writer.add(key, features)
        self._added.add(key)

    def close(self) -> None:
        """See Features; also reads what others have written."""
        if self._writer is not None and self._writer.pid == os.getpid():
            self._writer.close()
        self._writer = None
        self.refresh()

    def rows(self) -> Rows:
        """See Features."""
        return MappedRows(self._files, self.space)

    def damaged(self) -> Iterator[tuple[Path, int]]:
        """File and number of every row whose checksum is wrong. Reads everything."""
        rows = MappedRows(self._files, self.space)
        for place, checksum in sorted(self._checksums.items()):
            if zlib.crc32(rows.raw(place).data) != checksum:
                yield self._files[place >> 32], place & 0xFFFFFFFF


class MappedRows:
    """Rows of files mapped into memory, opened when they are first read; a copy in a worker opens its own."""

    def __init__(self, files: list[Path], space: Space) -> None:
        self._files, self._space = list(files), space
        self._maps: dict[int, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __call__(self, place: int) -> Tensor:
        """See Rows."""
        return torch.from_numpy(self.raw(place).copy()).view(DTYPES[self._space.dtype])

    def raw(self, place: int) -> NDArray[Any]:
        """Numbers of the same width as they lie in the file, [P, C'].

        Raises DataError for a file that is gone or shorter than it was."""
        number, row = place >> 32, place & 0xFFFFFFFF
        if number not in self._maps:
            self._maps[number] = self._mapped(self._files[number])
        rows = self._maps[number]
        if row >= len(rows):
            raise DataError(f"'{self._files[number]}' is cut off; `minigpt4 cache verify` tells more")
        found: NDArray[Any] = rows[row]
        return found

    def _mapped(self, path: Path) -> NDArray[Any]:
        kind, _ = _STORED[DTYPES[self._space.dtype].itemsize]
        try:
            count = path.stat().st_size // self._space.row_bytes
            return np.memmap(path, dtype=kind, mode="r", shape=(count, *self._space.shape))
        except (OSError, ValueError) as error:
            raise DataError(f"'{path}' cannot be read ({error}); was the vision cache cleared?") from error


class FeatureWriter:
    """Appends to files that no other process writes."""

    def __init__(self, folder: Path, space: Space, shard_bytes: int = _SHARD_BYTES) -> None:
        self.folder, self.space, self.pid = folder, space, os.getpid()
        self._most = max(1, shard_bytes // space.row_bytes)
        self._pending = bytearray()
        self._number = self._uncommitted = 0
        self._rows: FileIO | None = None  # without a buffer, which a fork would write twice
        self._committed = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / SPACE).is_file():
            write_atomically(folder / SPACE, json.dumps({"layout": LAYOUT, **asdict(space)}, indent=1))

    def add(self, key: bytes, features: Tensor) -> None:
        """Append features [P, C']; commits now and then. Raises DataError when the disk is full."""
        assert tuple(features.shape) == self.space.shape, (features.shape, self.space.shape)
        assert features.dtype == DTYPES[self.space.dtype], (features.dtype, self.space.dtype)
        _, width = _STORED[features.element_size()]
        content = features.contiguous().view(width).numpy().data.cast("B")
        try:
            if self._rows is None or self._number == self._most:
                self.close()
                self._path = self.folder / f"{secrets.token_hex(6)}.rows"
                self._rows, self._number = self._path.open("xb", buffering=0), 0
            written = 0
            while written < len(content):
                written += self._rows.write(content[written:])
            self._pending += _INDEX.pack(key, self._number, zlib.crc32(content))
            self._number += 1
            self._uncommitted += self.space.row_bytes
            if self._uncommitted >= _COMMIT_BYTES or time.monotonic() - self._committed > _COMMIT_S:
                self.commit()
        except OSError as error:
            raise DataError(f"the vision cache cannot be written to '{self.folder}': {error.strerror}") from error

    def commit(self) -> None:
        """Rows first, then the index that speaks of them."""
        if self._rows is not None and self._pending:
            os.fsync(self._rows.fileno())
            _append(self._path.with_suffix(".index"), self._pending)
        self._pending.clear()
        self._uncommitted, self._committed = 0, time.monotonic()

    def close(self) -> None:
        """Commit and leave the files."""
        self.commit()
        if self._rows is not None:
            self._rows.close()
            self._rows = None


class PictureNames:
    """Which content was found at which place; a file that changed since is another place."""

    def __init__(self, root: Path | None) -> None:
        """``root``: of the cache; None keeps nothing on disk."""
        self._folder = None if root is None else root / "pictures"
        self._path = None if self._folder is None else self._folder / f"{secrets.token_hex(6)}.names"
        self._known: dict[bytes, bytes] = {}
        self._read: dict[Path, int] = {}
        self._pending = bytearray()
        self._written = time.monotonic()
        self.refresh()

    def get(self, source: bytes) -> bytes | None:
        """Key of the content, if the place was looked at before."""
        return self._known.get(source)

    def put(self, source: bytes, content: bytes) -> None:
        """Remember, on disk after ``close`` or a while."""
        if self._known.get(source) != content:
            self._known[source] = content
            self._pending += _NAME.pack(source, content)
            if time.monotonic() - self._written > _COMMIT_S:
                self._write()

    def refresh(self) -> None:
        """Reads what others have written since."""
        for path in sorted(self._folder.glob("*.names")) if self._folder else ():
            self._known.update(_records(path, _NAME, self._read))

    def close(self) -> None:
        """Writes what is new and reads what others did."""
        self._write()
        self.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self) -> None:
        if self._path is not None and self._pending:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _append(self._path, self._pending)
        self._pending.clear()
        self._written = time.monotonic()


def _append(path: Path, content: bytes | bytearray) -> None:
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _records(path: Path, layout: struct.Struct, read: dict[Path, int]) -> Iterator[Any]:
    """Whole records behind what ``read`` says was read; half a record at the end is not there yet."""
    with path.open("rb") as file:
        file.seek(read.get(path, 0))
        content = file.read()
    whole = len(content) - len(content) % layout.size
    read[path] = read.get(path, 0) + whole
    yield from layout.iter_unpack(content[:whole])


def read_spaces(root: Path) -> list[Space]:
    """Every space below ``root``. Raises DataError for one of another version or that cannot be read."""
    return [_read_space(path) for path in sorted(root.glob(f"*/{SPACE}"))]


def _read_space(path: Path) -> Space:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("layout") != LAYOUT:
            raise DataError(f"'{path}': written by another version; remove the folder")
        return Space(**{**content, "shape": tuple(content["shape"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}': not readable as the description of a vision cache ({error})") from error


def clear_space(root: Path, key: str) -> int:
    """Removes one space; returns the bytes that were freed."""
    folder = root / key
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    (folder / SPACE).unlink()  # first: half a removed space is none
    shutil.rmtree(folder)
    return size


def clear_names(root: Path) -> int:
    """Forgets which content lies where; returns the bytes that were freed."""
    paths = list((root / "pictures").glob("*.names"))
    size = sum(path.stat().st_size for path in paths)
    for path in paths:
        path.unlink()
    return size
