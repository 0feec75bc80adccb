"""Computes the vision features that a cache lacks: decoded in loader workers, in batches, spread over ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minigpt4.common.bar import progress
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import DataError
from minigpt4.datasets.cached_pictures import Picture
from minigpt4.datasets.feature_cache import Features, MemoryFeatures, PictureNames
from minigpt4.datasets.pictures import content_key, encoded
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import frozen_features
from minigpt4.runners import job

BATCH = 16


@dataclass
class _Round:
    """Part of the pictures: content of each, pixels per preparation as (numbers, [N, 3, S, S]), what failed."""

    contents: dict[int, bytes] = field(default_factory=dict)
    pixels: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    messages: dict[int, str] = field(default_factory=dict)


@dataclass
class _Made:
    """What became of a round: content of each picture, rows by preparation and content, what failed."""

    contents: dict[int, bytes] = field(default_factory=dict)
    rows: list[tuple[str, bytes, Tensor]] = field(default_factory=list)
    messages: dict[int, str] = field(default_factory=dict)


class _Decoded(Dataset[_Round]):
    """Batches of pictures, read and prepared; those whose content is known are not decoded."""

    def __init__(
        self, pictures: Sequence[Picture], batches: Sequence[Sequence[int]], stores: Mapping[str, Features]
    ) -> None:
        self._pictures, self._batches, self._stores = pictures, batches, stores

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> _Round:
        done = _Round()
        tensors: dict[str, dict[int, Tensor]] = {}
        for which in self._batches[number]:
            picture = self._pictures[which]
            try:
                content = encoded(picture.source)
                key = content_key(content)
                if self._stores[picture.preparation].place(key) < 0:
                    pixels = picture.pixels(content)
                    tensors.setdefault(picture.preparation, {})[which] = pixels
                done.contents[which] = key
            except DataError as error:
                done.messages[which] = str(error)
        done.pixels = {name: (list(some), torch.stack(list(some.values()))) for name, some in tensors.items()}
        return done


@dataclass
class Filling:
    """What is to be filled: pictures, the store of every preparation, and the memory of contents."""

    model: BaseModel
    pictures: Sequence[Picture]
    stores: Mapping[str, Features]
    names: PictureNames
    dist: DistContext
    num_workers: int
    computed: int = 0  # pictures, all ranks together, after ``fill``

    def fill(self, missing: Sequence[int]) -> dict[int, str]:
        """Computes ``missing``, the same list on every rank. Returns why some could not be read, the same everywhere.

        Features on disk are shared by their files; those in memory go to every rank. After an error or a signal what
        was computed stays on disk.
        """
        dist, messages = self.dist, dict[int, str]()
        mine = missing[dist.rank :: dist.world_size]
        batches = [mine[start : start + BATCH] for start in range(0, len(mine), BATCH)]
        num_rounds = math.ceil(math.ceil(len(missing) / dist.world_size) / BATCH)
        is_sent = any(isinstance(store, MemoryFeatures) for store in self.stores.values())
        loader = DataLoader(
            _Decoded(self.pictures, batches, self.stores), batch_size=None, num_workers=self.num_workers,
            worker_init_fn=job.outlive_signals,
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            for store in self.stores.values():
                stack.callback(store.close)
            stack.callback(self.names.close)
            advance = stack.enter_context(progress("vision features", "pictures", len(missing), dist.is_main))
            rounds = iter(loader)
            for number in range(num_rounds):
                made = self._computed(next(rounds)) if number < len(batches) else _Made()
                for one in dist.gather_objects(made) if is_sent else [made]:
                    self._keep(one)
                    messages.update(one.messages)
                advance(min((number + 1) * BATCH * dist.world_size, len(missing)))
        own, self.computed = (messages, self.computed), 0
        for others, computed in dist.gather_objects(own):
            messages.update(others)
            self.computed += computed
        for store in self.stores.values():
            store.close()  # every rank has written: reads the others' files
        self.names.close()
        return messages

    def _computed(self, loaded: _Round) -> _Made:
        made = _Made(loaded.contents, [], loaded.messages)
        for name, (numbers, pixels) in loaded.pixels.items():
            new: dict[bytes, int] = {}  # content -> row of pixels
            for row, number in enumerate(numbers):
                key = loaded.contents[number]
                if not self.stores[name].has(key):
                    new.setdefault(key, row)
            if new:
                self.computed += len(new)
                features = frozen_features(self.model, pixels[list(new.values())])  # [N, P, C']
                made.rows += [(name, key, row) for key, row in zip(new, features, strict=True)]
        return made

    def _keep(self, made: _Made) -> None:
        for name, key, row in made.rows:
            if not self.stores[name].has(key):
                self.stores[name].add(key, row)
        for number, key in made.contents.items():
            self.names.put(self.pictures[number].key, key)
