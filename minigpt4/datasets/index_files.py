"""Indices on disk: where the samples of a large file lie, found once and valid for one version of it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.errors import DataError

_MAX_OPEN = 128


@dataclass(frozen=True)
class IndexFile:
    """A line of JSON, ``head``, and from byte ``start`` ``head["count"]`` rows of one size."""

    path: Path
    start: int
    head: dict[str, Any]


def index_places(source: Path) -> list[Path]:
    """Where the index of ``source`` may be: hidden beside it, or in the user's cache where that cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigptface" / "indices"
    key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    return [source.with_name(f".{source.name}.index"), cache / f"{key}-{source.name}.index"]


def version_of(source: Path, layout: int) -> dict[str, int]:
    """What an index must say to be valid; ``layout`` counts the ways its rows were ever written."""
    stat = source.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "layout": layout}


def read_indices(source: Path, version: Mapping[str, Any], row_size: int) -> Iterator[IndexFile]:
    """Indices of ``source`` that are of this version and not cut off, one at most per place."""
    for place in index_places(source):
        try:
            with place.open("rb") as stream:
                line = stream.readline()
            head, size = json.loads(line), place.stat().st_size
        except (OSError, ValueError):
            continue
        if not isinstance(head, dict) or any(head.get(key) != value for key, value in version.items()):
            continue
        if isinstance(head.get("count"), int) and size == len(line) + head["count"] * row_size:
            yield IndexFile(place, len(line), head)


def write_index(source: Path, head: dict[str, Any], rows: bytes) -> IndexFile | None:
    """Writes the index of ``source`` at the first place that can be written; None where none can.

    ``head`` holds its version and ``count``, the number of rows.
    """
    line = json.dumps(head).encode() + b"\n"
    for place in index_places(source):
        try:
            _write_atomically(place, line + rows)
        except OSError:
            continue  # a read-only place; the next one is the user's own
        return IndexFile(place, len(line), head)
    return None


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # ranks may write at the same time
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already when all went well


class OpenFiles:
    """File descriptors by path, a bounded number; read by ``os.pread``, so forked workers may share them.

    Nothing is mapped: what is read stays in the system's cache and counts for no process, and a file that is cut while
    it is in use is an error, where touching a map of it would end the process.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``. Raises DataError for a file that cannot be opened or is shorter."""
        descriptor = self._open.pop(path, -1)
        if descriptor < 0:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"'{path}' cannot be opened: {error.strerror}") from error
        self._open[path] = descriptor
        while len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        content = os.pread(descriptor, size, offset)
        if len(content) != size:
            raise DataError(f"'{path.name}': {len(content)} of {size} bytes at {offset}; it changed or is cut off")
        return content

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()  # descriptors mean nothing in another process

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
