"""Records of a large JSON list, of JSON lines or CSV that stay in their file: an index says where each one is."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import logging
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from minigpt4.common.errors import DataError
from minigpt4.datasets.index_files import IndexFile, OpenFiles, read_indices, version_of, write_index
from minigpt4.datasets.json_lists import stream_list_places

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
_LAYOUT = 1
_ROW = struct.Struct("<QII")  # first byte, bytes, number of the record or line
_BLOCK = 64
"""Records that one read takes in when all are wanted in order."""
_FIRST_LINE = 1 << 20
_TOLD_EVERY = 5.0  # seconds
_LABELS = {"json list": "record", "json lines": "line", "table": "line"}


class FileRecords:
    """Records of one file by index, each read and parsed when it is asked for.

    ``index``: where the records are; ``rows`` is its content where it could not be written to disk, else empty.
    """

    def __init__(self, path: Path, index: IndexFile | None, head: dict[str, Any], rows: bytes) -> None:
        self.shape: str = head["shape"]
        self.label = _LABELS[self.shape]
        self.digest: str = head["digest"]
        self._columns, self._delimiter = head["columns"], head["delimiter"]
        self._path, self._index, self._rows, self._count = path, index, rows, int(head["count"])
        self._files = OpenFiles()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """The record at ``index``. Raises DataError when the file is no longer the one that was indexed."""
        offset, size, _ = _ROW.unpack(self._packed_rows(index, 1))
        return self._parsed(self._files.read(self._path, offset, size))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, self._count, _BLOCK):
            rows = list(_ROW.iter_unpack(self._packed_rows(first, min(_BLOCK, self._count - first))))
            begin, end = rows[0][0], rows[-1][0] + rows[-1][1]
            content = self._files.read(self._path, begin, end - begin)
            for offset, size, _ in rows:
                yield self._parsed(content[offset - begin : offset - begin + size])

    def number(self, index: int) -> int:
        """Place in the list, or the line."""
        return int(_ROW.unpack(self._packed_rows(index, 1))[2])

    def _packed_rows(self, first: int, count: int) -> bytes:
        offset, size = first * _ROW.size, count * _ROW.size
        if self._index is None:
            return self._rows[offset : offset + size]
        return self._files.read(self._index.path, self._index.start + offset, size)

    def _parsed(self, content: bytes) -> dict[str, Any]:
        try:
            if not self._columns:
                record = json.loads(content.decode())
            else:
                rows = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=self._delimiter, strict=True)
                record = dict(zip(self._columns, next(rows), strict=True))
        except (ValueError, csv.Error, StopIteration) as error:
            raise DataError(f"'{self._path}' changed while it was in use: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"'{self._path}' changed while it was in use")
        return record


def index_records(path: Path) -> FileRecords | None:
    """The records of ``path`` by an index, read from its cache or made now, which parses every record once.

    None for a layout without an index, for a file with a mistake and for one that changes meanwhile: reading the whole
    file says what is wrong. The index is valid for one size and modification time.
    """
    version = version_of(path, _LAYOUT)
    for found in read_indices(path, version, _ROW.size):
        if found.head.get("shape") in _LABELS and found.head.get("crc") == _checksum(found):
            return FileRecords(path, found, found.head, b"")
    begun = time.monotonic()
    try:
        shape = _shape(path)
        columns, delimiter = _header(path) if shape == "table" else ([], "")
        rows = _scan(path, shape) if shape else b""
        if not rows:
            return None
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if version_of(path, _LAYOUT) != version:
            return None
    except (ValueError, OSError, csv.Error):
        return None
    count = len(rows) // _ROW.size
    head = {**version, "count": count, "crc": zlib.crc32(rows), "shape": shape, "digest": digest}
    head |= {"columns": columns, "delimiter": delimiter}
    written = write_index(path, head, rows)
    kept = "in memory: no place to write it" if written is None else f"as {written.path}"
    log.info("%s: %s records indexed in %.1f s, kept %s", path, f"{count:,}", time.monotonic() - begun, kept)
    return FileRecords(path, written, head, rows if written is None else b"")


def _checksum(index: IndexFile) -> int:
    checksum = 0
    with index.path.open("rb") as stream:
        stream.seek(index.start)
        while piece := stream.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _shape(path: Path) -> str:
    """'table', 'json list' or 'json lines', by name and first line; empty for objects of records and anything else."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return "table"
    if path.suffix.lower() == ".jsonl":
        return "json lines"
    with path.open("rb") as stream:
        line = stream.readline(_FIRST_LINE).removeprefix(codecs.BOM_UTF8)
    if line.startswith(b"["):
        return "json list"
    if not line.endswith(b"\n"):
        return ""
    json.loads(line.decode())  # lines under the name .json: the first of them is whole
    return "json lines"


def _scan(path: Path, shape: str) -> bytes:
    """Packed rows of all records. Raises ValueError for what is not read by an index."""
    rows = bytearray()
    size, told = path.stat().st_size, time.monotonic()
    found = {"json list": _listed, "json lines": _lines, "table": _table_rows}[shape]
    for record, offset, length, number in found(path):
        if not isinstance(record, dict) or length >= 1 << 32 or number >= 1 << 32:
            raise ValueError
        rows += _ROW.pack(offset, length, number)
        if time.monotonic() - told > _TOLD_EVERY:
            told = time.monotonic()
            log.info("%s: looking for its records, %d %%; later starts know them", path, 100 * offset // size)
    is_alone = len(rows) == _ROW.size and path.suffix.lower() == ".json" and shape == "json lines"
    return b"" if is_alone else bytes(rows)  # one object is no line of several


def _listed(path: Path) -> Iterator[tuple[Any, int, int, int]]:
    begin = _after_mark(path)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        for number, (record, text, offset) in enumerate(stream_list_places(stream)):
            yield record, begin + offset, len(text.encode()), number


def _lines(path: Path) -> Iterator[tuple[Any, int, int, int]]:
    offset = _after_mark(path)
    with path.open("rb") as stream:
        stream.seek(offset)
        for number, line in enumerate(stream, 1):
            text = line.decode()
            if "\r" in text.removesuffix("\n").removesuffix("\r"):
                raise ValueError  # ends a line for a text reader, and then numbers differ
            if text.strip():
                yield json.loads(text), offset, len(line), number
            offset += len(line)


def _header(path: Path) -> tuple[list[str], str]:
    """Columns and delimiter of a table. Raises ValueError for names that are empty or not unique."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        delimiter = delimiter_of(path, stream.readline())
        stream.seek(0)
        columns = next(csv.reader(stream, delimiter=delimiter, strict=True), [])
    if not columns or "" in columns or len(set(columns)) != len(columns):
        raise ValueError
    return columns, delimiter


def delimiter_of(path: Path, header: str) -> str:
    """What separates the columns of a table, from its name and its first line."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return ";" if "," not in header and ";" in header else ","  # spreadsheets with a decimal comma write ;


def _table_rows(path: Path) -> Iterator[tuple[Any, int, int, int]]:
    columns, delimiter = _header(path)
    begin = end = _after_mark(path)

    def counted(stream: TextIO) -> Iterator[str]:
        nonlocal end
        for line in stream:  # the reader takes as many as the next row has
            end += len(line.encode())
            yield line

    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(counted(stream), delimiter=delimiter, strict=True)
        for number, row in enumerate(reader):
            if number and row:  # 0: the names of the columns
                yield dict(zip(columns, row, strict=True)), begin, end - begin, reader.line_num
            begin = end


def _after_mark(path: Path) -> int:
    """Bytes of the byte order mark, if there is one."""
    with path.open("rb") as stream:
        return len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
