"""``run.cache_images``: gives data sets a place on disk for the pictures that they decode."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from PIL import Image

from minigpt4.common.errors import ConfigError
from minigpt4.common.files import free_disk
from minigpt4.common.schema import Config
from minigpt4.common.types import Pixels
from minigpt4.datasets.cached_pictures import preparation
from minigpt4.datasets.collate import SampleDataset
from minigpt4.datasets.map_dataset import MapDataset
from minigpt4.datasets.picture_cache import PictureCache
from minigpt4.runners.vision_cache import cache_root, is_random, size_text

log = logging.getLogger(__name__)


def use_picture_cache(cfg: Config, datasets: Sequence[SampleDataset]) -> None:
    """Lets ``datasets`` keep what they decode; those that prepare pictures alike share one cache.

    Raises ConfigError for a ``vis_processor`` with chance in it, or whose pictures are not bytes.
    """
    if not cfg.run.cache_images:
        return
    root, caches = cache_root(cfg), dict[str, PictureCache]()
    for dataset in datasets:
        if not isinstance(dataset, MapDataset):
            log.info("picture cache: data set '%s' comes as a stream, its pictures are not kept", dataset.name)
        elif dataset.features is not None:
            log.info("picture cache: data set '%s' has vision features, its pictures are not read", dataset.name)
        else:
            _check(dataset)
            name = preparation(dataset)
            if name not in caches:
                caches[name] = PictureCache(root, dataset)
            dataset.picture_cache = caches[name]
    for cache in caches.values():
        log.info(
            "picture cache: %s per picture, %d are there; %s are free for %s",
            size_text(cache.picture_bytes), len(cache), size_text(free_disk(root)), root,
        )  # fmt: skip


def _check(dataset: MapDataset) -> None:
    processor, where = dataset.recipe.vision, f"run.cache_images: vis_processor of data set '{dataset.name}'"
    if is_random(processor):
        raise ConfigError(f"{where} is random: {type(processor).__name__}; set it to false")
    grey = Image.fromarray(np.full((8, 8, 3), 128, dtype=np.uint8))
    if not isinstance(processor.prepare(grey), Pixels):
        raise ConfigError(f"{where} gives no bytes: {type(processor).__name__} has no 'prepare'; set it to false")
