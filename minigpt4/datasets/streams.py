"""Tar shards that can only be read from front to back: addresses and pipes, through webdataset.

A stream has no places to jump to. ``StreamDataset`` looks like a map-style set all the same: a window's keys decide how
many samples are drawn and with which templates, the stream of this loader worker decides which ones. So runs of
equal seed, ranks and workers see the same samples, a resumed run sees other ones, of the same distribution.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

from torch.utils.data import get_worker_info

from minigpt4.common.errors import DataError
from minigpt4.common.schema import DatasetConfig
from minigpt4.common.types import Sample
from minigpt4.datasets.map_dataset import MapDataset, Recipe
from minigpt4.datasets.pictures import HeldImage
from minigpt4.datasets.shards import IMAGE_ENDINGS, is_remote

log = logging.getLogger(__name__)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PREVIEW = 16
_SLACK = 10
"""So many broken samples and shards never stop a run with ``on_error: skip``: a share of few says little."""


def expand_addresses(storage: str | Sequence[str]) -> list[str]:
    """Addresses with their ranges ``{00000..00003}`` written out, as webdataset opens them.

    ``s3://`` becomes a pipe from the AWS command line. Other braces stay as they are: pipes are shell commands.
    """
    found = []
    for item in [storage] if isinstance(storage, str) else storage:
        for address in _expand_ranges(item):
            is_s3 = address.startswith("s3://")
            found.append(f"pipe:aws s3 cp {shlex.quote(address)} -" if is_s3 else address)
    missing = [address for address in found if not is_remote(address) and not os.path.isfile(address)]
    if missing:
        raise DataError(f"{len(missing)} of {len(found)} shards not found, the first one: '{missing[0]}'")
    return found


def _expand_ranges(pattern: str) -> list[str]:
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise DataError(f"'{pattern}': a range reads {{00000..00099}}, found '{match[0]}'")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    numbers = (str(number).zfill(len(match[1])) for number in range(first, last + 1))
    return [address for number in numbers for address in _expand_ranges(head + number + tail)]


@dataclass(frozen=True)
class Start:
    """Where a reader begins: the first window it serves, and its part of the shards."""

    window: int
    seed: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class _Part:
    """Consumer ``number`` of ``total`` loader workers of all ranks."""

    number: int
    total: int

    def of(self, addresses: Sequence[str]) -> tuple[list[str], int, int]:
        """Its shards, and which sample of how many it keeps of them: all, or every n-th where shards are too few."""
        if len(addresses) >= self.total:
            return list(addresses[self.number :: self.total]), 0, 1
        shard = self.number % len(addresses)
        sharers = range(shard, self.total, len(addresses))
        return [addresses[shard]], sharers.index(self.number), len(sharers)


def _read(addresses: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Samples of shards with their members' bytes; what is wrong with a member or a shard comes as text."""
    from webdataset.tariterators import tarfile_samples

    for address in addresses:
        complaints: list[str] = []

        def complain(error: Exception, address: str = address, found: list[str] = complaints) -> bool:
            reason = str(error.args[0] if error.args else error).partition(" @ ")[0]
            found.append(f"shard '{address}': {reason or type(error).__name__}")
            return True

        yield from tarfile_samples(iter([{"url": address}]), handler=complain)
        yield from complaints


def _passes(addresses: Sequence[str], part: _Part, key: str, buffer: int) -> Iterator[dict[str, Any] | str]:
    """One pass over a part after the other, each in an order of its own; a buffer is emptied before the next pass."""
    import webdataset as wds

    own, place, sharers = part.of(addresses)
    for number in count():
        rng = Random(f"{key}/{number}")
        rng.shuffle(own)
        items: Iterator[dict[str, Any] | str] = islice(_read(own), place, None, sharers)
        if buffer > 1:
            items = wds.shuffle(buffer, initial=min(100, buffer), rng=rng)(items)
        is_empty = True
        for item in items:
            is_empty = False
            yield item
        if is_empty:
            yield f"shard '{own[0]}' and {len(own) - 1} more hold no sample for loader worker {part.number}"


class StreamDataset(MapDataset):
    """Samples of streamed tars behind the face of a map-style set; ``len`` is what the YAML says.

    Every loader worker of every rank reads its own shards, over and over, each time in another order and through a
    shuffle buffer. Before ``begin`` a few samples from the front stand for the whole: checks and surveys read them.
    """

    def __init__(
        self, cfg: DatasetConfig, recipe: Recipe, addresses: Sequence[str], num_samples: int, shuffle_buffer: int
    ) -> None:
        super().__init__(cfg, recipe)
        self.addresses = list(addresses)
        self._num_samples, self._buffer = num_samples, shuffle_buffer
        self._reader: Iterator[dict[str, Any] | str] | None = None
        self._begun: tuple[int, int, int] | None = None
        self._place = "its first shard"
        self._num_read = self._num_bad = 0
        self._front: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self._num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_begun": None}  # pipes mean nothing in another process

    def begin(self, start: Start) -> None:
        """Called before each window; opens this process's stream at the first one.

        The order depends on that window, so that a resumed run does not see the first shards again.
        """
        here = (os.getpid(), start.rank, start.world_size)
        if here == self._begun:
            return
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part = _Part(start.rank * workers + number, start.world_size * workers)
        key = f"{start.seed}/{self.name}/{start.window}/{part.number}"
        self._begun, self._reader = here, _passes(self.addresses, part, key, self._buffer)
        self._num_read = self._num_bad = 0
        if part.number:
            return
        if start.window:
            log.warning(
                "dataset '%s' is a stream and has no position: from window %d on it is shuffled anew, so the run goes "
                "on with other samples of the same distribution, not with the ones that would have come",
                self.name, start.window,
            )  # fmt: skip
        if len(self.addresses) < part.total:
            log.warning(
                "dataset '%s': %d shards for %d loader workers of all ranks; several read the same one and keep their "
                "share of its samples", self.name, len(self.addresses), part.total,
            )  # fmt: skip

    def where(self, index: int) -> str:
        """Shard and key of the sample that was read last."""
        del index
        return self._place

    def record(self, index: int) -> dict[str, Any]:
        """The mapped record of a sample from the front, as formats read it."""
        front = self.front()
        return self._record(front[index % len(front)])

    def pictures(self, index: int) -> list[Path | bytes]:
        """Bytes of the one picture of a sample from the front."""
        front = self.front()
        return [_picture(front[index % len(front)])]

    def load(self, index: int, rng: Random) -> Sample:
        """The next sample of the stream, whatever ``index``; before ``begin`` one from the front."""
        if self._reader is None:
            front = self.front()
            return self._sample(front[index % len(front)], rng)
        self._num_read += 1
        item = next(self._reader)
        if isinstance(item, str):
            self._place = "its stream"
            raise DataError(item)
        return self._sample(item, rng)

    def front(self) -> list[dict[str, Any]]:
        """The first samples, read once. Raises DataError when there is none, or for a broken one where that counts."""
        if not self._front:
            complaints = []
            for item in _read(self.addresses):
                if isinstance(item, str):
                    complaints.append(item)
                    if self.cfg.on_error == "raise" or (len(complaints) > _SLACK and not self._front):
                        raise DataError(f"dataset '{self.name}': {item}")
                else:
                    self._front.append(item)
                if len(self._front) == _PREVIEW:
                    break
            if not self._front:
                why = complaints[0] if complaints else f"{len(self.addresses)} shards hold no sample"
                raise DataError(f"dataset '{self.name}': {why}")
        return self._front

    def _sample(self, item: Mapping[str, Any], rng: Random) -> Sample:
        shard, key = _short(item["__url__"]), item["__key__"]
        self._place = f"{shard}, sample {key}"
        record = self._record(item)
        image = _picture(item)

        return self.make_sample(-1, record, lambda: [HeldImage(image, key)], f"{shard}/{key}", rng)

    def _record(self, item: Mapping[str, Any]) -> dict[str, Any]:
        members = [name for name in item if not name.startswith("__")]
        text = item.get("json", item.get("txt"))
        if text is None or not any(ending in item for ending in IMAGE_ENDINGS):
            raise DataError(f"it has {', '.join(members)}; needed: an image and json or txt")
        try:
            record: Any = json.loads(text) if "json" in item else {"caption": text.decode().strip()}
        except ValueError as error:
            raise DataError(f"its text cannot be read: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"its JSON holds {type(record).__name__}, expected an object")
        return {**self.recipe.mapped(record), "images": [str(item["__key__"])]}

    def _count_bad(self, index: int, message: str) -> None:
        del index  # a stream's indices name nothing; the share is that of what was read so far
        self._num_bad += 1
        if self._num_bad > max(_SLACK, self.cfg.max_bad_fraction * self._num_read):
            found = f"{self._num_bad} of {self._num_read} samples and shards read here are broken"
            raise DataError(
                f"dataset '{self.name}': {found}, max_bad_fraction allows {self.cfg.max_bad_fraction}; "
                f"the last one: {message}"
            )
        if self._num_bad & (self._num_bad - 1) == 0:
            log.warning("%s; skipped (%d so far in this process)", message, self._num_bad)

    def fingerprint(self) -> str:
        """Hash over the addresses; what lies there is not looked at."""
        return hashlib.sha256("\n".join(self.addresses).encode()).hexdigest()


def _picture(item: Mapping[str, Any]) -> bytes:
    found: bytes = next(item[ending] for ending in IMAGE_ENDINGS if ending in item)
    return found


def _short(address: str) -> str:
    """The last part of an address or command that names a tar."""
    names = re.findall(r"[^\s/'\"]+\.tar[.\w]*", address)
    return names[-1] if names else address
