"""``model.cache_vision``: every picture of a run goes through the frozen vision part once, before training starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.dist import DistContext
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.files import free_disk
from minigpt4.common.schema import Config, ProcessorConfig
from minigpt4.common.types import as_floats
from minigpt4.datasets.cached_pictures import Wanted, attach, preparation
from minigpt4.datasets.collate import SampleDataset
from minigpt4.datasets.feature_cache import Features, FeatureStore, MemoryFeatures, PictureNames, Space
from minigpt4.datasets.map_dataset import MapDataset
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import feature_shape, release, why_not_frozen
from minigpt4.processors.base import ImageProcessor, ImageSpec, make_image_processor
from minigpt4.runners.feature_fill import Filling
from minigpt4.runners.vision_records import asked_in, described

log = logging.getLogger(__name__)

LEAST_PASSES = 2.0
"""Passes over the data before ``auto`` finds a cache worth it."""
_MOST_MEMORY = 0.9
_DRAWS = 8
"""Times that a picture is prepared to find out whether chance takes part."""


@dataclass
class Pictures:
    """The pictures of some data sets, the stores of their features, and which content lies where."""

    wanted: Wanted
    stores: Mapping[str, Features]
    names: PictureNames
    shown: list[Any] = field(default_factory=list)

    def place(self, number: int) -> int:
        """Where the features of a wanted picture are; -1 where there are none."""
        picture = self.wanted.pictures[number]
        content = self.names.get(picture.key)
        return -1 if content is None else self.stores[picture.preparation].place(content)

    def missing(self) -> list[int]:
        """Numbers of the pictures without features."""
        return [number for number in range(len(self.wanted.pictures)) if self.place(number) < 0]


def cache_root(cfg: Config) -> Path:
    """``run.cache_root``, else MINIGPT4_CACHE, else a folder that the jobs of ``run.output_dir`` share."""
    given = cfg.run.cache_root or os.environ.get("MINIGPT4_CACHE") or Path(cfg.run.output_dir) / "vision_cache"
    return Path(given).expanduser()


def known_vision(cfg: Config, dist: DistContext) -> Callable[[str], bool] | None:
    """See ``asked_in``, of the cache of a run."""
    return asked_in(cache_root(cfg), cfg, dist)


def use_cache(
    cfg: Config, model: BaseModel, datasets: Sequence[SampleDataset], dist: DistContext, passes: float
) -> dict[str, Tensor]:
    """Fills the cache, gives the data sets its features, frees the vision part; returns features of the canaries.

    passes: over the data, that the run will make. Every rank must call it. Raises ConfigError where ``cache_vision`` is
    memory or disk and impossible; then ``auto`` goes on without.
    """
    if cfg.model.cache_vision == "off":
        return {}
    features = _features(cfg, model, datasets, dist, passes) if datasets else {}
    if model.reads_pixels:  # no cache after all
        model.load_vision()
    return features


def _features(
    cfg: Config, model: BaseModel, datasets: Sequence[SampleDataset], dist: DistContext, passes: float
) -> dict[str, Tensor]:
    """See ``use_cache``."""
    mode = cfg.model.cache_vision
    problem = why_not(model, datasets)
    if not problem and mode == "auto" and passes < LEAST_PASSES:
        problem = f"the run makes {passes:.1f} passes over the data, a cache pays off from {LEAST_PASSES:.0f} on"
    if problem:
        if mode != "auto":
            raise ConfigError(f"model.cache_vision {mode}: {problem}; set it to off")
        log.info("vision cache: off, %s", problem)
        return {}
    sets = [dataset for dataset in datasets if isinstance(dataset, MapDataset)]
    root = None if mode == "memory" else cache_root(cfg)
    canaries = [canary.image for canary in cfg.run.valid.canaries if canary.image]
    pictures = find_pictures(model, sets, root, dist, canaries, canary_processor(model))
    missing: list[int] = dist.broadcast_object(pictures.missing())  # another job may be writing: one list for all ranks
    if not _is_affordable(mode, pictures, missing, root, dist):
        return {}
    filling = Filling(model, pictures.wanted.pictures, pictures.stores, pictures.names, dist, cfg.run.num_workers)
    messages = filling.fill(missing) if missing else {}
    result = _attach(pictures, sets, canaries, messages)
    _say(pictures, root, filling.computed, messages)
    _free(model)
    return result


def show_prediction(cfg: Config, model: BaseModel, datasets: Sequence[SampleDataset]) -> None:
    """What a cache would take at most, of a model on the meta device; nothing is written."""
    if cfg.model.cache_vision == "off":
        return
    problem = why_not(model, datasets)
    if problem:
        log.info("vision cache: impossible, %s", problem)
        return
    wanted = Wanted()
    for dataset in datasets:
        if isinstance(dataset, MapDataset):
            wanted.add_dataset(dataset)
    positions, channels = feature_shape(model)
    size = positions * channels * model.dtype.itemsize
    free = free_memory() if cfg.model.cache_vision == "memory" else free_disk(cache_root(cfg))
    log.info(
        "vision cache: %s, %d pictures of %s = %s without what is there already; %s are free",
        cfg.model.cache_vision, len(wanted.pictures), size_text(size), size_text(size * len(wanted.pictures)),
        size_text(free),
    )  # fmt: skip


def why_not(model: BaseModel, datasets: Sequence[SampleDataset]) -> str:
    """Why features cannot be kept; empty when they can."""
    trained = why_not_frozen(model)
    if trained:
        return f"the vision part is not frozen, {trained}"
    for dataset in datasets:
        if not isinstance(dataset, MapDataset) or type(dataset).sources is MapDataset.sources:
            return f"data set '{dataset.name}' does not know its pictures before they are read"
        if is_random(dataset.recipe.vision):
            return f"vis_processor of data set '{dataset.name}' is random: {type(dataset.recipe.vision).__name__}"
    return ""


def is_random(processor: ImageProcessor) -> bool:
    """Whether it says so, or gives different pixels of one picture."""
    if processor.is_random:
        return True
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    first = as_floats(processor.prepare(picture))
    return any(not torch.equal(as_floats(processor.prepare(picture)), first) for _ in range(_DRAWS))


def canary_processor(model: BaseModel) -> ImageProcessor:
    """What prepares the pictures of ``run.valid.canaries``."""
    spec = ImageSpec(model.cfg.image_size, model.image_mean, model.image_std)
    return make_image_processor(ProcessorConfig(name="blip2_image_eval"), spec)


def find_pictures(
    model: BaseModel,
    datasets: Sequence[MapDataset],
    root: Path | None,
    dist: DistContext,
    files: Sequence[str] = (),
    processor: ImageProcessor | None = None,
) -> Pictures:
    """Every picture of the data sets, and of ``files``, with the stores they belong to. root: None for memory."""
    wanted = Wanted()
    shown = [wanted.add_dataset(dataset) for dataset in datasets]
    if files and processor is not None:
        wanted.add_files(files, processor)
    about, shape = described(model, root, dist)
    dtype = str(model.dtype).removeprefix("torch.")
    weights = {key: path for key, path in model.weight_files(model.cfg).items() if key != "ckpt"}
    notes = {"vit_model": model.cfg.vit_model, "image_size": str(model.cfg.image_size), **weights}
    stores: dict[str, Features] = {}
    for name in dict.fromkeys([*map(preparation, datasets), *(one.preparation for one in wanted.pictures)]):
        space = Space(shape, dtype, {**about, "pixels": name}, notes)
        stores[name] = MemoryFeatures(space) if root is None else FeatureStore(root, space)
    return Pictures(wanted, stores, PictureNames(root), shown)


def _attach(
    pictures: Pictures, datasets: Sequence[MapDataset], canaries: Sequence[str], messages: Mapping[int, str]
) -> dict[str, Tensor]:
    """Features for the data sets; those of the canaries by path. Raises DataError for pictures that have none."""
    numbers = range(len(pictures.wanted.pictures))
    places = [pictures.place(number) for number in numbers]
    lost = next((number for number in numbers if places[number] < 0 and number not in messages), None)
    if lost is not None:
        raise DataError(f"image '{pictures.wanted.pictures[lost].source}' changed while its features were computed")
    rows = {name: store.rows() for name, store in pictures.stores.items()}
    for dataset, shown in zip(datasets, pictures.shown, strict=True):
        attach(dataset, shown, rows[preparation(dataset)], places, messages)
    found: dict[str, Tensor] = {}
    for number in numbers if canaries else ():
        picture = pictures.wanted.pictures[number]
        if str(picture.source) in canaries and places[number] >= 0:
            found.setdefault(str(picture.source), rows[picture.preparation](places[number]))
    return found


def _is_affordable(mode: str, pictures: Pictures, missing: Sequence[int], root: Path | None, dist: DistContext) -> bool:
    """Says what the cache takes and what there is. False: ``auto`` finds it too large. Raises ConfigError."""
    verdict, said = "", ""
    if dist.is_main:
        verdict, said = _verdict(mode, pictures, len(missing), root)
    verdict, said = dist.broadcast_object((verdict, said))
    if verdict == "error":
        raise ConfigError(f"model.cache_vision {mode}: {said}")
    log.info("vision cache: %s%s", "off, " if verdict else "", said)
    return not verdict


def _verdict(mode: str, pictures: Pictures, num_missing: int, root: Path | None) -> tuple[str, str]:
    """('' | 'off' | 'error', a sentence with all numbers)."""
    size = next(iter(pictures.stores.values())).space.row_bytes
    need = num_missing * size
    said = f"{len(pictures.wanted.pictures):,} pictures of {size_text(size)}, {num_missing:,} to compute"
    said += f" = {size_text(need)}"
    if root is None:
        copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = free_memory()
        said += f" in each of {copies} processes" if copies > 1 else ""
        said += f"; {size_text(free)} of memory are free"
        return ("error", f"{said}; use disk, or off") if need * copies > _MOST_MEMORY * free else ("", said)
    free = free_disk(root)
    said += f"; {size_text(free)} are free for {root}"
    if mode == "auto" and need > free / 2:
        return "off", f"{said}, auto takes half of it at most"
    return ("error", f"{said}; point run.cache_root to a larger disk, or off") if need > free else ("", said)


def _say(pictures: Pictures, root: Path | None, computed: int, messages: Mapping[int, str]) -> None:
    count = len(pictures.wanted.pictures) - len(messages)
    where = "in memory" if root is None else f"in {root}"
    log.info("vision cache: features of %d pictures %s, %d of them computed now", count, where, computed)
    if messages:
        log.warning(
            "vision cache: %d pictures cannot be read, for example %s", len(messages), next(iter(messages.values()))
        )


def _free(model: BaseModel) -> None:
    freed = release(model)
    if not model.has_vision:
        log.info("vision cache: the files of the vision part were not read, all features are there")
    elif freed:
        log.info("vision cache: tower and Q-Former have left %s, which frees %s", model.device, size_text(freed))
    else:  # random weights on a CPU
        log.info("vision cache: tower and Q-Former stay in memory, checkpoints hold their weights")


def free_memory() -> int:
    """Bytes that can be used without swapping; within the limit of a container, where there is one."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    reported = _number_in("/proc/meminfo", lambda text: 1024 * int(text.split("MemAvailable:")[1].split()[0]))
    limit = _number_in("/sys/fs/cgroup/memory.max", int)
    used = _number_in("/sys/fs/cgroup/memory.current", int)
    free = reported or free
    return free if limit is None or used is None else min(free, max(limit - used, 0))


def _number_in(path: str, read: Callable[[str], int]) -> int | None:
    try:
        return read(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError, IndexError):  # another system, or 'max': no limit
        return None


def size_text(count: int) -> str:
    """Bytes for people: '2.88 MB'."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} GB"
