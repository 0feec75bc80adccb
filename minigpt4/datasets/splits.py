"""Which records are held out: a hash of the picture, or of another field, decides for all records that share it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt4.common.errors import DataError
from minigpt4.common.schema import DatasetConfig
from minigpt4.datasets.annotations import Annotations, Record
from minigpt4.datasets.image_finder import ImageFinder
from minigpt4.datasets.kept import kept
from minigpt4.datasets.map_dataset import Recipe, record_id
from minigpt4.datasets.stored import StoredImage, content_hash

_HASH = "<u8"


def split_indices(
    annotations: Annotations, recipe: Recipe, finder: ImageFinder, cfg: DatasetConfig, split: str
) -> Sequence[int]:
    """Indices of 'train' or 'val' when a fraction is held out; all records of one group fall on one side.

    A group is a value of ``val.group_by``: the image path, or any other field (a person, a video).
    The side is a hash of that value, so it stays the same when records are added. Hashes of large files are kept beside
    their index. Raises DataError for a field that is not there and a split without records.
    """
    hashes = _kept_hashes(annotations, recipe, finder, cfg)
    is_held_out = hashes.astype(np.float64) / 2**64 < cfg.val.fraction
    chosen = np.flatnonzero(is_held_out if split == "val" else ~is_held_out)
    if not len(chosen):
        share = f"val.fraction {cfg.val.fraction} of {len(annotations)} records"
        raise DataError(f"dataset '{cfg.name}': {share} leaves no sample for split '{split}'")
    # numbers of Python's own: they are compared, hashed and printed as such; four bytes each in every loader worker
    return _Indices(chosen.astype(np.uint32))


class _Indices(Sequence[int]):
    """Record numbers in little memory."""

    def __init__(self, numbers: NDArray[np.uint32]) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __array__(self, *_: Any, **__: Any) -> NDArray[np.uint32]:
        return self._numbers

    def __getitem__(self, index: Any) -> Any:
        """One number, or those of a slice."""
        found = self._numbers[index]
        return _Indices(found) if isinstance(index, slice) else int(found)


def _kept_hashes(
    annotations: Annotations, recipe: Recipe, finder: ImageFinder, cfg: DatasetConfig
) -> NDArray[np.uint64]:
    """A hash per record, from disk where annotations are large and were hashed before."""
    settings = [sorted(recipe.fields.items()), cfg.val.group_by, finder.names]
    place = kept(annotations, "split", settings, _HASH)
    found = place.read() if place else None
    if found:
        return found[0]
    hashes = np.fromiter(_hashes(annotations, recipe, finder, cfg), np.dtype(_HASH))
    if place:
        place.write(hashes)
    return hashes


def _hashes(annotations: Annotations, recipe: Recipe, finder: ImageFinder, cfg: DatasetConfig) -> Iterator[int]:
    for index, record in enumerate(annotations):
        group = _group(annotations, index, recipe.mapped(record), finder, cfg.val.group_by)
        yield int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def _group(annotations: Annotations, index: int, mapped: Record, finder: ImageFinder, group_by: str) -> str:
    if group_by == "image":
        return "|".join(map(_same_picture, finder.named(mapped)["images"])) or record_id(mapped, index)
    if group_by in mapped:
        return str(mapped[group_by])
    columns = ", ".join(map(str, mapped))
    raise DataError(f"{annotations.where(index)}: val.group_by '{group_by}' is no field of: {columns}")


def _same_picture(image: str | StoredImage) -> str:
    """Equal for one picture in many rows: tables hold it once per row, often under one name for all."""
    return content_hash(image) if isinstance(image, StoredImage) else image
