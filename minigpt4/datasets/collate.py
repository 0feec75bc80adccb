"""Samples become batches, in a loader worker: encoded, then padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minigpt4.common.errors import DataError
from minigpt4.common.pictures import distinct
from minigpt4.common.schema import DatasetConfig
from minigpt4.common.types import IGNORE_INDEX, BadRecord, Batch, Encoded, Pixels, Sample, as_floats
from minigpt4.datasets.balance import Groups
from minigpt4.datasets.sampler import WindowSampler
from minigpt4.datasets.streams import Start, StreamDataset

if TYPE_CHECKING:
    from minigpt4.conversation.encoding import Encoder


class SampleDataset(Protocol):
    """Map-style and deterministic."""

    @property
    def name(self) -> str:
        """The YAML key."""

    @property
    def cfg(self) -> DatasetConfig:
        """The YAML block."""

    def __len__(self) -> int: ...

    def groups(self) -> Groups | None:
        """Groups to be balanced, if the YAML asks for it."""

    def sample(self, pass_index: int, index: int, seed: int) -> Sample:
        """A pure function of its arguments."""

    def fingerprint(self) -> str:
        """Hash of the data."""

    def facts(self, index: int) -> dict[str, Any]:
        """What a report may say of a sample besides question and answer."""


@dataclass(frozen=True)
class _Item:
    """One encoded sample with the pictures that have positions in its ids."""

    encoded: Encoded
    images: tuple[Tensor | Pixels, ...]
    sample_id: str
    passed_over: tuple[BadRecord, ...]

    def __len__(self) -> int:
        return len(self.encoded.ids)


def collate_padded(samples: Sequence[Sample], encoder: Encoder) -> Batch:
    """One row per sample, padded at the right end: input_ids [B, T]. Raises DataError that names the sample."""
    items = [_encode(sample, encoder) for sample in samples]
    return _batch([[item] for item in items], encoder.tokenizer.pad_id)


def collate_packed(samples: Sequence[Sample], encoder: Encoder, row_tokens: int) -> list[Batch]:
    """Rows of at most ``row_tokens`` positions, each a Batch with input_ids [1, T] and no padding.

    First fit in the order given. A sample is never split; one that is longer than ``row_tokens`` has a row of its own.
    """
    rows: list[list[_Item]] = []
    used: list[int] = []
    for item in (_encode(sample, encoder) for sample in samples):
        row = next((number for number, length in enumerate(used) if length + len(item) <= row_tokens), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(item)
        used[row] += len(item)
    return [_batch([row], encoder.tokenizer.pad_id) for row in rows]


def _encode(sample: Sample, encoder: Encoder) -> _Item:
    try:
        encoded = encoder.encode_turns(sample.turns)
    except DataError as error:
        raise DataError(f"sample '{sample.sample_id}': {error}") from error
    if encoded.num_images > len(sample.images):
        raise DataError(f"sample '{sample.sample_id}': {encoded.num_images} image tags, {len(sample.images)} images")
    return _Item(encoded, sample.images[: encoded.num_images], sample.sample_id, sample.passed_over)


def _batch(rows: Sequence[Sequence[_Item]], pad_id: int) -> Batch:
    """Rows of whole samples -> tensors [R, T]; R is 1, or every row holds one sample."""
    width = max(sum(map(len, row)) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.long)
    items = [item for row in rows for item in row]
    for number, row in enumerate(rows):
        start = 0
        for item in row:
            end = start + len(item)
            input_ids[number, start:end] = torch.tensor(item.encoded.ids)
            position_ids[number, start:end] = torch.arange(len(item))
            labels[number, start:end] = torch.tensor(item.encoded.labels)
            labels[number, start] = IGNORE_INDEX  # nothing before it in its own sample predicts it
            start = end
    pictures, order = distinct([image for item in items for image in item.images])
    images, image_norm = _stacked(pictures)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        images=images,
        lengths=tuple(len(item) for item in items),
        num_target_tokens=int((labels != IGNORE_INDEX).sum()),
        sample_ids=tuple(item.sample_id for item in items),
        passed_over=tuple(bad for item in items for bad in item.passed_over),
        image_order=torch.tensor(order) if len(order) > len(pictures) else None,
        image_norm=image_norm,
    )


def _stacked(pictures: Sequence[Tensor | Pixels]) -> tuple[Tensor, Tensor | None]:
    """Pictures as one tensor [N, ...]: bytes and how to normalise them where all want the same, else floats."""
    if not pictures:
        return torch.zeros(0, 3, 1, 1), None
    pixels = [picture for picture in pictures if isinstance(picture, Pixels)]
    if len(pixels) == len(pictures) and len({(one.mean, one.std) for one in pixels}) == 1:
        return torch.stack([one.values for one in pixels]), pixels[0].norm()
    return torch.stack([as_floats(picture) for picture in pictures]), None


class WindowDataset(Dataset[list[Batch]]):
    """One item is this rank's share of one window. ``packing``: 'packed' or 'padded' (one Batch per micro-batch)."""

    def __init__(
        self,
        datasets: Sequence[SampleDataset],
        sampler: WindowSampler,
        encoder: Encoder,
        packing: str,
        row_tokens: int,
        seed: int,
    ) -> None:
        assert packing in ("packed", "padded"), packing
        self._datasets, self._sampler, self._encoder = list(datasets), sampler, encoder
        self._packing, self._row_tokens, self._seed = packing, row_tokens, seed
        self._streams = [dataset for dataset in datasets if isinstance(dataset, StreamDataset)]

    def __getitem__(self, window: int) -> list[Batch]:
        for stream in self._streams:
            stream.begin(Start(window, self._seed, self._sampler.rank, self._sampler.world_size))
        micro_batches = [
            [self._datasets[key.dataset].sample(key.pass_index, key.index, self._seed) for key in keys]
            for keys in self._sampler.window(window)
        ]
        if self._packing == "padded":
            return [collate_padded(samples, self._encoder) for samples in micro_batches]
        together = [sample for samples in micro_batches for sample in samples]
        return collate_packed(together, self._encoder, self._row_tokens)
