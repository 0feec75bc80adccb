"""``run.cache_images``: decoded and scaled pictures on disk, written by whoever reads one first.

Unlike frozen vision features they serve runs that train the tower, and take less room than many features.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

from torch import Tensor

from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.files import free_disk
from minigpt4.common.types import Pixels
from minigpt4.datasets.cached_pictures import preparation
from minigpt4.datasets.feature_cache import FeatureStore, Space
from minigpt4.datasets.map_dataset import MapDataset
from minigpt4.datasets.pictures import ImageSource, source_key

log = logging.getLogger(__name__)

LEAST_FREE = 2 << 30
"""Bytes of the disk that stay free for checkpoints."""
_LOOK_EVERY = 256  # pictures between two looks at the disk


class PictureCache:
    """Pixels by the place of a picture; a file that changed is another place. Any number of processes share it."""

    def __init__(self, root: Path, dataset: MapDataset) -> None:
        """Raises ConfigError for a processor whose pictures are not bytes."""
        size = dataset.recipe.vision.spec.size
        self._root = root
        self._store = FeatureStore(root, Space((3, size, size), "uint8", {"pixels": preparation(dataset)}))
        self._rows, self._read_at = self._store.rows(), self._store.refreshed
        self._spec = dataset.recipe.vision.spec
        self._added, self._is_writable = 0, True
        self._writing_pid = 0

    def __len__(self) -> int:
        return len(self._store)

    @property
    def picture_bytes(self) -> int:
        """What one picture takes."""
        return self._store.space.row_bytes

    def __call__(self, source: ImageSource, prepare: Callable[[ImageSource], Tensor | Pixels]) -> Pixels:
        """The pixels of ``source``; ``prepare`` makes those that are not there yet. Raises DataError."""
        key = source_key(source)
        is_known = self._store.has(key)  # also reads, now and then, what others have written
        if self._store.refreshed != self._read_at:
            self._rows, self._read_at = self._store.rows(), self._store.refreshed
        place = self._store.place(key)
        if place >= 0:
            return Pixels(self._rows(place), self._spec.mean, self._spec.std)
        pixels = prepare(source)
        if not isinstance(pixels, Pixels):
            raise ConfigError("run.cache_images: this vis_processor gives no bytes; set it to false")
        if self._is_writable and not is_known:
            self._keep(key, pixels.values)
        return pixels

    def close(self) -> None:
        """What this process added is on disk, and what others added is known."""
        self._store.close()

    def _keep(self, key: bytes, values: Tensor) -> None:
        """A full disk ends the writing, not the run."""
        if self._writing_pid != os.getpid():  # of this run or of one of its loader workers
            self._writing_pid = os.getpid()
            Finalize(self, self._store.close, exitpriority=0)
        try:
            if self._added % _LOOK_EVERY == 0 and free_disk(self._root) < LEAST_FREE:
                raise DataError(f"less than {LEAST_FREE >> 30} GiB are free for {self._root}")
            self._store.add(key, values)
            self._added += 1
        except DataError as error:
            self._is_writable = False
            log.warning("picture cache: nothing more is kept, %s", error)
