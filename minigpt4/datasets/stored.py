"""Pictures that lie inside a table: Parquet and Arrow files, as Hugging Face writes them. Read when asked for."""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from minigpt4.common.errors import DataError

_KEPT_FILES = 128
_KEPT_GROUPS = 4
"""Row groups of Parquet files that stay decompressed: reading one picture reads its whole group."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A picture's place: table file, column, row, and position in a list (-1: the cell is the picture).

    ``name``: the file name it had before, as far as the table knows it.
    """

    file: str
    column: str
    row: int
    position: int = -1
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name or self.column} of {Path(self.file).name}, row {self.row}"

    def read(self) -> bytes:
        """The encoded picture; of a cell without bytes the file it names, absolute or beside the table.

        Raises DataError when there is neither.
        """
        cell = _cell(self.file, self.column, self.row)
        if self.position >= 0 and cell is not None:
            cell = cell[self.position]
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if content:
            return bytes(content)
        path = Path(self.file).parent / self.name
        if self.name and path.is_file():
            return path.read_bytes()
        named = f", and its path '{self.name}' leads to no file" if self.name else ""
        raise DataError(f"field '{self.column}' holds no picture bytes{named}")

    def open(self) -> io.BytesIO:
        """The encoded picture as a stream."""
        return io.BytesIO(self.read())


@lru_cache(maxsize=1 << 20)
def content_hash(image: StoredImage) -> str:
    """The same for the same bytes, wherever they are stored: one picture may be asked about in many rows."""
    return hashlib.sha256(image.read()).hexdigest()


def arrow(path: str | Path) -> ModuleType:
    """pyarrow with its readers. Raises DataError with the command that installs it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading tables needs pyarrow; pip install 'minigptface[data]'") from None
    module: ModuleType = pyarrow
    return module


@lru_cache(maxsize=_KEPT_FILES)
def open_parquet(path: str) -> Any:
    """A ParquetFile over mapped memory. Raises DataError for a file that is none."""
    pa = arrow(path)
    try:
        return pa.parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_one_line(error)}") from None


@lru_cache(maxsize=_KEPT_FILES)
def open_arrow(path: str) -> Any:
    """A Table over mapped memory: nothing is read before it is used. Stream and file format. Raises DataError."""
    pa = arrow(path)
    try:
        with pa.memory_map(path) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _cell(path: str, column: str, row: int) -> Any:
    if path.lower().endswith(".arrow"):
        return open_arrow(path).column(column)[row].as_py()
    starts = _group_starts(path)
    number = bisect_right(starts, row) - 1
    return _row_group(path, column, number)[row - starts[number]].as_py()


@lru_cache(maxsize=_KEPT_FILES)
def _group_starts(path: str) -> tuple[int, ...]:
    """First row of every row group that holds rows; ends with the number of rows."""
    metadata = open_parquet(path).metadata
    sizes = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    return tuple(accumulate(sizes, initial=0))


@lru_cache(maxsize=_KEPT_GROUPS)
def _row_group(path: str, column: str, number: int) -> Any:
    # loader workers are forked: no pool of threads that a fork would cut off
    return open_parquet(path).read_row_group(number, columns=[column], use_threads=False).column(column)
