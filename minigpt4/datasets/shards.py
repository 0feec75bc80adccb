"""Tar shards on disk (webdataset layout) as a map-style data set: one index, then random reads."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from minigpt4.common.errors import DataError
from minigpt4.common.schema import DatasetConfig
from minigpt4.common.types import Sample
from minigpt4.datasets.index_files import OpenFiles, index_places, read_indices, version_of, write_index
from minigpt4.datasets.map_dataset import MapDataset, Recipe
from minigpt4.datasets.pictures import TarImage

log = logging.getLogger(__name__)

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_ROW = struct.Struct("<5q")  # image offset, image size, text offset, text size, text is JSON
_REMOTE = re.compile(r"^([a-z0-9+]+://|pipe:)")
_BRACES = re.compile(r"\{([^{}]*)\}")


def is_remote(item: str) -> bool:
    """Whether a shard is an address (``https://...``) or a command (``pipe:...``)."""
    return _REMOTE.match(item) is not None


def expand_shards(storage: str | Sequence[str]) -> list[Path]:
    """A brace pattern ``{00000..00003}.tar``, a glob, a directory or a list of these -> existing tar files.

    Raises DataError for addresses, for patterns without a match and for missing files.
    """
    paths: list[Path] = []
    for item in [storage] if isinstance(storage, str) else storage:
        if is_remote(item):
            raise DataError(f"'{item}': a stream cannot be read by index; name local files here")
        for pattern in _expand_braces(item):
            path = Path(pattern).expanduser()
            if path.is_dir():
                paths += sorted(path.glob("*.tar"))
            elif any(sign in pattern for sign in "*?["):
                base = Path(path.anchor) if path.is_absolute() else Path()
                paths += sorted(base.glob(str(path.relative_to(path.anchor))))
            else:
                paths.append(path)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} shards not found, the first one: '{missing[0]}'")
    if not paths:
        raise DataError(f"'{storage}' matches no tar file")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots:
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise DataError(f"'{pattern}': a range reads {{00000..00099}}, found '{match[0]}'")
        options = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        options = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for option in options for path in _expand_braces(head + option + tail)]


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one tar lie. ``path``: the index file, a JSON line and then one row per sample."""

    path: Path
    start: int
    count: int
    bad: int
    example: str


def index_shard(tar: Path) -> ShardIndex:
    """The index of ``tar``, read from its cache or made now.

    It is valid for one size and modification time. Broken and truncated members are counted. Raises DataError where it
    cannot be written.
    """
    version = version_of(tar, layout=1)
    found = next(read_indices(tar, version, _ROW.size), None)
    if found is None:
        rows, bad, example = _scan(tar)
        head = {**version, "count": len(rows) // _ROW.size, "bad": bad, "example": example}
        found = write_index(tar, head, rows)
    if found is None:
        places = " nor to ".join(map(str, index_places(tar)))
        raise DataError(f"'{tar}': its index can be written neither to {places}")
    return ShardIndex(found.path, found.start, found.head["count"], found.head["bad"], found.head["example"])


def _scan(tar: Path) -> tuple[bytes, int, str]:
    """Rows of all whole samples, the number of broken ones, and one of them by name."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    broken: list[str] = []
    for key, ending, offset, size in _members(tar, broken):
        samples.setdefault(key, {})[ending] = (offset, size)
    rows = bytearray()
    for key, parts in samples.items():
        image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
        text = parts.get("json") or parts.get("txt")
        if image is None or text is None:
            broken.append(f"{tar.name}: sample '{key}' has {', '.join(parts)}; needed: an image and json or txt")
            continue
        rows += _ROW.pack(*image, *text, "json" in parts)
    return bytes(rows), len(broken), broken[0] if broken else ""


def _members(tar: Path, broken: list[str]) -> Iterator[tuple[str, str, int, int]]:
    """Key, ending, offset and size of every whole file; what is broken is added to ``broken``."""
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                folder, _, name = member.name.rpartition("/")
                base, _, ending = name.partition(".")
                if not member.isfile() or name.startswith("__"):
                    continue
                if member.offset_data + member.size > size:
                    broken.append(f"{tar.name}: '{member.name}' is cut off")
                    return
                archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every member otherwise
                yield f"{folder}/{base}", ending.lower(), member.offset_data, member.size
            with tar.open("rb") as stream:
                stream.seek(archive.offset)
                if stream.read(512).strip(b"\0"):  # tarfile ends silently at a damaged header
                    broken.append(f"{tar.name}: damaged header at byte {archive.offset}")
    except tarfile.TarError as error:
        broken.append(f"{tar.name}: {error}")


class ShardDataset(MapDataset):
    """Samples of tar files: a picture and ``.json`` (a record) or ``.txt`` (its caption) under the same key."""

    def __init__(self, cfg: DatasetConfig, recipe: Recipe, shards: Sequence[Path]) -> None:
        super().__init__(cfg, recipe)
        self._tars = list(shards)
        self._indices = [index_shard(tar) for tar in shards]
        self._ends = array("Q", accumulate(index.count for index in self._indices))
        self._files = OpenFiles()
        bad = sum(index.bad for index in self._indices)
        if bad:
            example = next(index.example for index in self._indices if index.bad)
            log.warning("dataset '%s': %d broken samples left out, for example %s", cfg.name, bad, example)
        if not len(self):
            raise DataError(f"dataset '{cfg.name}': {len(self._tars)} shards hold no sample")

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[int, int]:
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def where(self, index: int) -> str:
        """'00003.tar, sample 000030017'."""
        shard, row = self._place(index)
        return f"{self._tars[shard].name}, sample {self._key(shard, self._row(shard, row)[0])}"

    def record(self, index: int) -> dict[str, Any]:
        """The mapped record with ``images``, as formats read it."""
        shard, row = self._place(index)
        return self._record(shard, self._row(shard, row))

    def load(self, index: int, rng: Random) -> Sample:
        """Three reads: the row of the index, the text, the picture."""
        shard, number = self._place(index)
        row = self._row(shard, number)
        picture = self._picture(shard, row)
        name = f"{self._tars[shard].name}/{picture.key}"
        return self.make_sample(index, self._record(shard, row), lambda: [picture], name, rng)

    def sources(self, index: int) -> list[TarImage]:
        """One place in a tar."""
        shard, row = self._place(index)
        return [self._picture(shard, self._row(shard, row))]

    def _picture(self, shard: int, row: Sequence[int]) -> TarImage:
        return TarImage(self._tars[shard], row[0], row[1], self._key(shard, row[0]), self._files)

    def _row(self, shard: int, row: int) -> tuple[int, ...]:
        index = self._indices[shard]
        return _ROW.unpack(self._files.read(index.path, index.start + row * _ROW.size, _ROW.size))

    def _key(self, shard: int, offset: int) -> str:
        # the 512 bytes before a file are its header, which starts with the name
        name = self._files.read(self._tars[shard], offset - 512, 100).rstrip(b"\0").decode(errors="replace")
        return name.rpartition("/")[2].partition(".")[0]

    def _record(self, shard: int, row: Sequence[int]) -> dict[str, Any]:
        content = self._files.read(self._tars[shard], row[2], row[3])
        try:
            record: Any = json.loads(content) if row[4] else {"caption": content.decode().strip()}
        except ValueError as error:
            raise DataError(f"its text cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"its JSON holds {type(record).__name__}, expected an object")
        return {**self.recipe.mapped(record), "images": [f"{self._tars[shard].name}"]}

    def fingerprint(self) -> str:
        """Hash over names, sizes and index of the shards."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tar, index in zip(self._tars, self._indices, strict=True):
            digest.update(f"{tar.name}\0{tar.stat().st_size}\0{index.count}\0".encode())
            digest.update(index.path.read_bytes()[index.start :])
        return digest.hexdigest()
