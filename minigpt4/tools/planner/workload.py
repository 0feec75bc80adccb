"""What one optimiser step works on: lengths of samples, rows made of them, the effective batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from minigpt4.common.schema import Config
from minigpt4.common.types import IGNORE_INDEX, IMAGE_TOKEN, Batch
from minigpt4.runners.parts import Plan


@dataclass(frozen=True)
class SampleShape:
    """Positions of one sample: its images, ``prompt`` tokens (BOS among them) and ``answer`` tokens."""

    images: int
    image_tokens: int
    prompt: int
    answer: int

    @property
    def positions(self) -> int:
        """All of them."""
        return self.images * self.image_tokens + self.prompt + self.answer

    @property
    def text(self) -> str:
        """For people."""
        images = f"{self.images * self.image_tokens} image + " if self.images else ""
        return f"{self.positions:,} positions ({images}{self.prompt} prompt + {self.answer} answer)"


@dataclass(frozen=True)
class SetLengths:
    """Samples of one data set. source: where the lengths come from. size: number of samples, None when unknown."""

    name: str
    batch_size: int
    ratio: float
    mean: SampleShape
    longest: SampleShape
    source: str
    size: int | None


@dataclass(frozen=True)
class Row:
    """The row of a window that needs most: ``samples`` equal samples, one behind another when packed.

    adds_up: the window's earlier rows have left gradients before it starts.
    """

    samples: int
    shape: SampleShape
    packed: bool
    adds_up: bool
    source: str

    def with_samples(self, samples: int) -> Row:
        """The same row with another number of samples."""
        return replace(self, samples=samples)

    @property
    def positions(self) -> int:
        """Of all samples."""
        return self.samples * self.shape.positions

    def batch(self, images: Sequence[int], dtype: torch.dtype = torch.float32) -> Batch:
        """Integers on the CPU, images on the meta device. images, dtype: of one, [3, S, S] or features [P, C']."""
        shape = self.shape
        image_end = 1 + shape.images * shape.image_tokens
        input_ids = torch.zeros(self.samples, shape.positions, dtype=torch.long)
        input_ids[:, 1:image_end] = IMAGE_TOKEN
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, shape.positions - shape.answer :] = 0
        labels[:, 0] = IGNORE_INDEX
        position_ids = torch.arange(shape.positions).repeat(self.samples, 1)
        if self.packed:
            input_ids, labels, position_ids = (t.reshape(1, -1) for t in (input_ids, labels, position_ids))
        count = self.samples * shape.images
        return Batch(
            input_ids=input_ids,
            position_ids=position_ids,
            labels=labels,
            images=torch.empty((count, *images) if count else (0, 3, 1, 1), dtype=dtype, device="meta"),
            lengths=(shape.positions,) * self.samples,
            num_target_tokens=int((labels != IGNORE_INDEX).sum()),
        )


@dataclass(frozen=True)
class Window:
    """One optimiser step of all GPUs. steps: None when the length of an epoch is not known."""

    samples_per_micro_batch: float
    accumulation: int
    gpus: int
    tokens: float
    supervised: float
    steps: int | None

    @property
    def samples(self) -> float:
        """The effective batch."""
        return self.samples_per_micro_batch * self.accumulation * self.gpus

    @property
    def text(self) -> str:
        """One line."""
        steps = "unknown (run.iters_per_epoch is absent, and so is data)" if self.steps is None else f"{self.steps:,}"
        gpus = "1 GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        return (
            f"{self.samples:.4g} samples per optimiser step = {self.samples_per_micro_batch:.4g} per micro-batch x "
            f"{self.accumulation} accumulated x {gpus}; about {self.tokens:,.0f} tokens, {self.supervised:,.0f} of "
            f"them supervised; optimiser steps of the run: {steps}"
        )


def make_window(cfg: Config, sets: Sequence[SetLengths], gpus: int) -> Window:
    """Expected sizes of an optimiser step; its number of steps as the runner counts them."""
    run, total = cfg.run, sum(item.ratio for item in sets)
    shares = [item.ratio / total * item.batch_size for item in sets]
    micro_batches = run.accum_grad_iters * gpus
    iterations: float | None = run.iters_per_epoch
    sizes = [item.size for item in sets if item.size is not None]
    if iterations is None and len(sizes) == len(sets):
        iterations = math.ceil(sum(sizes) / (sum(shares) * gpus))
    steps = None
    if iterations is not None:
        steps = Plan(run.accum_grad_iters, math.ceil(iterations / run.accum_grad_iters), run.max_epoch).total_windows
    return Window(
        sum(shares),
        run.accum_grad_iters,
        gpus,
        micro_batches * sum(share * item.mean.positions for share, item in zip(shares, sets, strict=True)),
        micro_batches * sum(share * item.mean.answer for share, item in zip(shares, sets, strict=True)),
        steps,
    )


def fullest_row(sets: Sequence[SetLengths], window: Window, packed: bool, row_tokens: int) -> Row:
    """The row with most positions that the window can hold: of mean or of longest samples, of any set.

    Padded: a micro-batch of the set's batch_size. Packed: as many samples of the window as fit ``row_tokens``; all
    micro-batches of a window may come from the set with the largest batch_size.
    """
    available = max(item.batch_size for item in sets) * window.accumulation
    rows = []
    for item in sets:
        for shape, kind in ((item.mean, "mean of "), (item.longest, "longest of ")):
            samples = item.batch_size if not packed else max(1, min(available, row_tokens // shape.positions))
            rows_per_window = math.ceil(available / samples) if packed else window.accumulation
            source = ("" if item.mean == item.longest else kind) + item.source
            rows.append(Row(samples, shape, packed, rows_per_window > 1, source))
    return max(rows, key=lambda row: row.positions)
