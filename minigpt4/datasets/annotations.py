"""Annotation files -> records. JSON, JSON lines, CSV; each record knows where it was written. Others: ``sources``."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from minigpt4.common.errors import DataError, nearest

Record = dict[str, Any]
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", *TABLE_SUFFIXES)
_SHAPES = (
    'a list of records, {"annotations": [records]}, {"data": [records]}, {"section": [records]}, {"id": record}, '
    'or {"image path": "text"}; a record is an object'
)
_CHUNK = 1 << 22
_TAIL = 1 << 20
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_LISTS = ("annotations", "data")
"""Keys of an object that holds a list of records beside other things."""


class Annotations(Sequence[Record]):
    """Records of one or more files, kept packed.

    A few hundred bytes per record in one buffer instead of a tree of objects: loader workers that are forked read it
    without copying, and it travels to spawned ones as it is.
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.layout = "records"  # records | mapping
        self.shape = ""  # what was read, for messages: 'json list'
        self.root: Path | None = None  # folder of the pictures, where the layout decides it
        self.listing = ""  # stands for the content in the fingerprint, where ``paths`` are folders
        self._packed = bytearray()
        self._ends = array("Q", [0])
        self._numbers = array("Q")
        self._groups: list[tuple[int, str, str]] = []  # first index, 'faces.csv, line', section

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """The record at ``index`` as a new dict."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return pickle.loads(memoryview(self._packed)[self._ends[index] : self._ends[index + 1]])

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """'faces.csv, line 7': file and place of a record, for messages."""
        return f"{self._group(index)[1]} {self._numbers[index]}"

    def section(self, index: int) -> str:
        """Name of the section a record was written in; empty for files without sections."""
        return self._group(index)[2]

    def _group(self, index: int) -> tuple[int, str, str]:
        return self._groups[bisect_right(self._groups, index, key=lambda item: item[0]) - 1]

    def start_group(self, label: str, section: str = "") -> None:
        """Records added from now on are found at ``label`` and their number."""
        self._groups.append((len(self), label, section))

    def add(self, record: Any, number: int) -> None:
        """Appends one record. Raises DataError for anything but an object."""
        if not isinstance(record, dict):
            raise DataError(f"{self._groups[-1][1]} {number}: found {_kind(record)}, expected an object")
        self._packed += pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._packed))
        self._numbers.append(number)

    def extend(self, other: Annotations) -> None:
        """Appends all records of ``other`` with their places."""
        base, start = len(self._packed), len(self)
        self._groups += [(start + first, label, section) for first, label, section in other._groups]
        self._packed += other._packed
        self._ends.extend(base + end for end in other._ends[1:])
        self._numbers.extend(other._numbers)
        self.paths += other.paths
        self.listing += other.listing
        self.layout, self.shape = other.layout, other.shape

    def filtered(self, keep: Callable[[Record], bool]) -> Annotations:
        """The records that ``keep`` keeps, with their places."""
        out = Annotations()
        out.paths, out.layout, out.shape = self.paths, self.layout, self.shape
        for (first, label, section), (end, *_) in pairwise([*self._groups, (len(self), "", "")]):
            out.start_group(label, section)
            for index in range(first, end):
                record = self[index]
                if keep(record):
                    out.add(record, self._numbers[index])
        return out

    def fingerprint(self) -> str:
        """Hash over name, size and content of the files; of tables, which hold pictures too, over their last megabyte.

        A table ends with the places and sizes of its parts.
        """
        digest = hashlib.sha256(self.listing.encode())
        for path in self.paths:
            if path.is_dir():
                continue
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as stream:
                if path.suffix.lower() in TABLE_SUFFIXES:
                    stream.seek(max(0, path.stat().st_size - _TAIL))
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


def read_annotations(paths: Iterable[str | Path], sections: Sequence[str] | None = None) -> Annotations:
    """All records of ``paths`` in order.

    ``sections``: names of a ``{section: [records]}`` file, taken in this order; None for files without sections.
    A file is parsed once per process as long as it does not change. Raises DataError with file, found and allowed.
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
    del size, mtime_ns  # they only tell versions of the file apart
    out = Annotations()
    out.paths = [path]
    suffix = path.suffix.lower()
    try:
        with path.open(encoding="utf-8-sig", newline="" if suffix in (".csv", ".tsv") else None) as stream:
            if suffix == ".json":
                _read_json(out, stream, sections)
            elif sections is not None:
                raise DataError(f"{path}: sections are parts of a .json file; '{suffix}' has none")
            elif suffix == ".jsonl":
                _read_lines(out, stream)
            else:
                _read_csv(out, stream, "\t" if suffix == ".tsv" else ",")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if len(out) == 0:
        raise DataError(f"{path}: holds no records")
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


def stream_list(stream: TextIO) -> Iterator[Any]:
    """Items of a JSON list, without holding the list: as Python objects it takes several times the file's size.

    Raises JSONDecodeError. Commas are not checked, and a number may come in two pieces: lists of records hold objects.
    """
    return (item for item, _ in stream_list_texts(stream))


def stream_list_texts(stream: TextIO) -> Iterator[tuple[Any, str]]:
    """As ``stream_list``, each item with its own characters of the file, for tools that copy records unchanged."""
    decoder = json.JSONDecoder()
    text, line = "", 1
    while not text.strip() and (more := stream.read(_CHUNK)):
        text += more
    if text.lstrip()[:1] != "[":
        raise json.JSONDecodeError("expected a list", text, 0)
    place = text.index("[") + 1
    while True:
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # matches nothing at least
        if text[place : place + 1] == "]":
            break
        try:
            item, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            more = stream.read(_CHUNK)
            if not more:
                error.lineno += line - 1
                raise
            line += text.count("\n", 0, place)
            text, place = text[place:] + more, 0  # an object that goes on in the next piece
        else:
            yield item, text[place:end]
            place = end
    if (text[place + 1 :] + stream.read()).strip():
        raise json.JSONDecodeError("Extra data", text, place + 1)


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


def _read_csv(out: Annotations, stream: TextIO, delimiter: str) -> None:
    path = out.paths[0]
    header = stream.readline()
    stream.seek(0)
    if delimiter == "," and "," not in header and ";" in header:  # spreadsheets with a decimal comma write this
        delimiter = ";"
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
