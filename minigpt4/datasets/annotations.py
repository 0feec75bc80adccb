"""Annotation files -> records. JSON, JSON lines, CSV; each record knows where it was written. Others: ``sources``."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TextIO

from minigpt4.common.errors import DataError, nearest
from minigpt4.datasets.json_lists import stream_list
from minigpt4.datasets.record_index import SUFFIXES as INDEXED
from minigpt4.datasets.record_index import delimiter_of, index_records

Record = dict[str, Any]
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", *TABLE_SUFFIXES)
_SHAPES = (
    'a list of records, {"annotations": [records]}, {"data": [records]}, {"section": [records]}, {"id": record}, '
    'or {"image path": "text"}; a record is an object'
)
_TAIL = 1 << 20
INDEXED_FROM = 32 << 20
"""Bytes from which records of a list or lines of JSON or of a table stay in their file: reading less takes seconds."""
_LISTS = ("annotations", "data")
"""Keys of an object that holds a list of records beside other things."""


class Part(Protocol):
    """Records of one source by index, and what number each has there."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int, /) -> Record:
        """A new dict, index 0 to length - 1."""

    def __iter__(self) -> Iterator[Record]:
        """All records in order."""

    def number(self, index: int) -> int:
        """Line, record, row: what the label of the record's group counts."""


class PackedRecords:
    """A few hundred bytes per record in one buffer instead of a tree of objects.

    Loader workers that are forked read it without copying, and it travels to spawned ones as it is.
    """

    def __init__(self) -> None:
        self._packed = bytearray()
        self._ends = array("Q", [0])
        self._numbers = array("Q")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int, /) -> Record:
        """The record at ``index`` as a new dict."""
        record: Record = pickle.loads(memoryview(self._packed)[self._ends[index] : self._ends[index + 1]])
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def number(self, index: int) -> int:
        """Where the record was written, as ``add`` was told."""
        return self._numbers[index]

    def add(self, record: Record, number: int) -> None:
        """Appends one record."""
        self._packed += pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._packed))
        self._numbers.append(number)


class ChosenRecords:
    """Some records of ``source`` in their order, none of them copied."""

    def __init__(self, source: Annotations, chosen: Sequence[int]) -> None:
        self._source, self._chosen = source, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> Record:
        """The record at ``index`` as a new dict."""
        record: Record = self._source[self._chosen[index]]
        return record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def number(self, index: int) -> int:
        """The number it has in ``source``."""
        return self._source.number(self._chosen[index])


class Annotations(Sequence[Record]):
    """Records of one or more files: packed in memory, or left in a large file whose index says where they are."""

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.layout = "records"  # records | mapping
        self.shape = ""  # what was read, for messages: 'json list'
        self.root: Path | None = None  # folder of the pictures, where the layout decides it
        self.listing = ""  # stands for the content in the fingerprint, where ``paths`` are folders
        self.digests: dict[Path, str] = {}  # SHA-256 of files whose index knows it
        self.is_whole = True  # no record of the files was left out
        self._parts: list[Part] = []
        self._starts: list[int] = []  # index of each part's first record
        self._open: PackedRecords | None = None  # the last part, while it may grow
        self._groups: list[tuple[int, str, str]] = []  # first index, 'faces.csv, line', section

    def __len__(self) -> int:
        return self._starts[-1] + len(self._parts[-1]) if self._parts else 0

    def __getitem__(self, index: Any) -> Any:
        """The record at ``index`` as a new dict. Raises DataError for one whose file changed meanwhile."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        part, inner = self._part(index % len(self))
        return part[inner]

    def __iter__(self) -> Iterator[Record]:
        for part in self._parts:
            yield from part

    def where(self, index: int) -> str:
        """'faces.csv, line 7': file and place of a record, for messages."""
        return f"{self._group(index)[1]} {self.number(index)}"

    def number(self, index: int) -> int:
        """The number of a record in its file, as its place is told."""
        part, inner = self._part(index)
        return part.number(inner)

    def section(self, index: int) -> str:
        """Name of the section a record was written in; empty for files without sections."""
        return self._group(index)[2]

    def _part(self, index: int) -> tuple[Part, int]:
        place = bisect_right(self._starts, index) - 1
        return self._parts[place], index - self._starts[place]

    def _group(self, index: int) -> tuple[int, str, str]:
        return self._groups[bisect_right(self._groups, index, key=lambda item: item[0]) - 1]

    def start_group(self, label: str, section: str = "") -> None:
        """Records added from now on are found at ``label`` and their number."""
        self._groups.append((len(self), label, section))

    def add(self, record: Any, number: int) -> None:
        """Appends one record. Raises DataError for anything but an object."""
        if not isinstance(record, dict):
            raise DataError(f"{self._groups[-1][1]} {number}: found {_kind(record)}, expected an object")
        if self._open is None:
            part = PackedRecords()
            self.append(part)
            self._open = part
        self._open.add(record, number)

    def append(self, part: Part) -> None:
        """Appends the records of ``part``, which stay where they are; they belong to the last group."""
        self._starts.append(len(self))
        self._parts.append(part)
        self._open = None

    def extend(self, other: Annotations) -> None:
        """Appends all records of ``other`` with their places."""
        start = len(self)
        self._groups += [(start + first, label, section) for first, label, section in other._groups]
        other._open = None  # its last part is shared from now on
        for part in other._parts:
            self.append(part)
        self.paths += other.paths
        self.listing += other.listing
        self.digests.update(other.digests)
        self.is_whole &= other.is_whole
        self.layout, self.shape = other.layout, other.shape

    def filtered(self, keep: Callable[[Record], bool]) -> Annotations:
        """The records that ``keep`` keeps, with their places."""
        kept = array("Q", (index for index, record in enumerate(self) if keep(record)))
        out = Annotations()
        out.is_whole = False
        out.paths, out.layout, out.shape = self.paths, self.layout, self.shape
        out.root, out.listing, out.digests = self.root, self.listing, self.digests
        out._groups = [(bisect_left(kept, first), label, section) for first, label, section in self._groups]
        out.append(ChosenRecords(self, kept))
        return out

    def fingerprint(self) -> str:
        """Hash over name, size and content of the files; of tables, which hold pictures too, over their last megabyte.

        A table ends with the places and sizes of its parts. The content of a file with an index was hashed with it.
        """
        digest = hashlib.sha256(self.listing.encode())
        for path in self.paths:
            if path.is_dir():
                continue
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            if path in self.digests:
                digest.update(bytes.fromhex(self.digests[path]))
                continue
            with path.open("rb") as stream:
                if path.suffix.lower() in TABLE_SUFFIXES:
                    stream.seek(max(0, path.stat().st_size - _TAIL))
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def read_annotations(paths: Iterable[str | Path], sections: Sequence[str] | None = None) -> Annotations:
    """All records of ``paths`` in order.

    ``sections``: names of a ``{section: [records]}`` file, taken in this order; None for files without sections.
    A file is parsed once per process as long as it does not change; of a large JSON list, of JSON lines and of CSV an
    index is kept on disk and no record in memory. Raises DataError with file, found and allowed.
    """
    parts = []
    for path in map(Path, paths):
        check_file(path)
        stat = path.stat()
        chosen = None if sections is None else tuple(sections)
        parts.append(_read(path, stat.st_size, stat.st_mtime_ns, chosen))
    return joined(parts)


def joined(parts: Sequence[Annotations]) -> Annotations:
    """The records of all ``parts`` in order."""
    if len(parts) == 1:
        return parts[0]  # as it is kept: nobody changes it
    whole = Annotations()
    for part in parts:
        whole.extend(part)
    return whole


def check_file(path: Path) -> None:
    """Raises DataError when ``path`` is no readable annotation file by name."""
    if path.is_dir():
        raise DataError(f"'{path}' is a directory, expected a file: {', '.join(SUFFIXES)}")
    if not path.is_file():
        siblings = [item.name for item in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"'{path}' not found{nearest(path.name, siblings)}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"'{path}' has the ending '{path.suffix}', allowed: {', '.join(SUFFIXES)}")


# The check of a configuration and the building of its data sets follow each other: one parse serves both.
@lru_cache(maxsize=64)
def _read(path: Path, size: int, mtime_ns: int, sections: tuple[str, ...] | None) -> Annotations:
    del mtime_ns  # it only tells versions of the file apart
    suffix = path.suffix.lower()
    if suffix in INDEXED and sections is None and size >= INDEXED_FROM:
        indexed = _indexed(path)
        if indexed is not None:
            return indexed
    out = Annotations()
    out.paths = [path]
    try:
        with path.open(encoding="utf-8-sig", newline="" if suffix in (".csv", ".tsv") else None) as stream:
            if suffix == ".json":
                _read_json(out, stream, sections)
            elif sections is not None:
                raise DataError(f"{path}: sections are parts of a .json file; '{suffix}' has none")
            elif suffix == ".jsonl":
                _read_lines(out, stream)
            else:
                _read_csv(out, stream)
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if len(out) == 0:
        raise DataError(f"{path}: holds no records")
    return out


def _indexed(path: Path) -> Annotations | None:
    """Records left in the file; None for a layout without an index and for mistakes, which reading it tells."""
    found = index_records(path)
    if found is None:
        return None
    out = Annotations()
    out.paths, out.shape, out.digests = [path], found.shape, {path: found.digest}
    out.start_group(f"{path}, {found.label}")
    out.append(found)
    return out


def _read_json(out: Annotations, stream: TextIO, sections: tuple[str, ...] | None) -> None:
    path = out.paths[0]
    try:
        if sections is None and stream.read(1) == "[":
            stream.seek(0)
            out.shape = "json list"
            out.start_group(f"{path}, record")
            for number, record in enumerate(stream_list(stream)):
                out.add(record, number)
            return
        stream.seek(0)
        content = json.load(stream)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json
            stream.seek(0)
            return _read_lines(out, stream)
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if sections is not None:
        out.shape = "json sections"
        return _read_sections(out, content, sections)
    if isinstance(content, dict):
        content = next((content[key] for key in _LISTS if isinstance(content.get(key), list)), content)
    if isinstance(content, list):
        out.shape = "json list"
        out.start_group(f"{path}, record")
        for number, record in enumerate(content):
            out.add(record, number)
    elif isinstance(content, dict) and content and all(isinstance(text, str) for text in content.values()):
        out.layout, out.shape = "mapping", "json object of image path: text"
        out.start_group(f"{path}, entry")
        for number, (image, text) in enumerate(content.items()):
            out.add({"image": image, "text": text}, number)
    elif isinstance(content, dict) and content and all(isinstance(record, dict) for record in content.values()):
        out.shape = "json object of id: record"
        out.start_group(f"{path}, entry")
        for number, (key, record) in enumerate(content.items()):
            out.add({"id": key, **record}, number)
    elif isinstance(content, dict) and any(isinstance(records, list) for records in content.values()):
        names = ", ".join(content)
        raise DataError(
            f"{path}: holds sections ({names}); choose some: build_info: {{sections: [{next(iter(content))}]}}"
        )
    else:
        raise DataError(f"{path}: found {_kind(content)}, allowed: {_SHAPES}")


def _read_sections(out: Annotations, content: Any, sections: tuple[str, ...]) -> None:
    """Appends the chosen sections. Names are compared without spaces around them: published keys have some."""
    path = out.paths[0]
    if not isinstance(content, dict):
        raise DataError(f'{path}: found {_kind(content)}, expected {{"section": [records]}}')
    known = {key.strip(): key for key in content}
    for name in sections:
        if name.strip() not in known:
            raise DataError(f"{path}: no section '{name}'{nearest(name, known)}; known: {', '.join(known)}")
        records = content[known[name.strip()]]
        if not isinstance(records, list):
            raise DataError(f"{path}: section '{name}' holds {_kind(records)}, expected a list of records")
        out.start_group(f"{path}, section '{name.strip()}', record", name.strip())
        for number, record in enumerate(records):
            out.add(record, number)
    if len(out) == 0:
        raise DataError(f"{path}: the chosen sections ({', '.join(sections)}) hold no records")


def _read_lines(out: Annotations, stream: TextIO) -> None:
    out.shape = "json lines"
    out.start_group(f"{out.paths[0]}, line")
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            out.add(json.loads(line), number)
        except json.JSONDecodeError as error:
            raise DataError(f"{out.paths[0]}, line {number}: not valid JSON: {error.msg}") from None


def _read_csv(out: Annotations, stream: TextIO) -> None:
    path = out.paths[0]
    delimiter = delimiter_of(path, stream.readline())
    stream.seek(0)
    reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
    out.shape = "table"
    out.start_group(f"{path}, line")
    try:
        columns = reader.fieldnames or []
        if len(set(columns)) != len(columns) or "" in columns:
            raise DataError(f"{path}, line 1: column names must be unique and not empty, found: {', '.join(columns)}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.line_num}: the row does not have {len(columns)} values")
            out.add(row, reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        keys = ", ".join(repr(key) for key in list(value)[:5])
        return f"an object with the keys {keys}" if value else "an empty object"
    names = {list: "a list", str: "text", type(None): "null", bool: "true/false"}
    return names.get(type(value), "a number")
