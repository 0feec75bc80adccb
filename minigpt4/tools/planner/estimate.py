"""Predicted memory of one GPU for a variant of the run and a row, and which cards hold it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from minigpt4.common.registry import registry
from minigpt4.common.schema import Config
from minigpt4.models.frozen_vision import releasable
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.split_model import left_whole
from minigpt4.tools.planner.skeleton import PartBytes, Variant, build_skeleton, parts_of
from minigpt4.tools.planner.split import Ranks, host_bytes
from minigpt4.tools.planner.trace import StepBytes, StepTracer
from minigpt4.tools.planner.workload import Row

CARDS = (8, 12, 16, 24, 40, 80)
"""Sizes of GPUs in the gigabytes that sellers write."""
_USABLE = 1.025e9
"""A card of n 'GB' has n x 1.074e9 bytes; driver and display leave about this much of each to a program."""
FRAGMENTS = 0.03
"""Share that rows of changing length can lose between blocks of PyTorch's allocator."""
CONTEXT = 600_000_000
"""CUDA context, cuBLAS workspaces and loaded kernels; 0.4 to 0.8e9 is usual."""
_LINE = (1, 4)
"""Samples per row between which the bytes of a further sample are measured."""


def usable_bytes(card_gb: float) -> int:
    """What a program can allocate on a card sold as ``card_gb``, its CUDA context included."""
    return int(card_gb * _USABLE)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one GPU at the fullest moment. context: what PyTorch does not count, at any moment.

    filling: while the vision cache is filled, before the first step; 0 without one. host: of a node while its ranks
    start a split model; 0 where the model is whole.
    """

    variant: Variant
    row: Row
    parts: tuple[PartBytes, ...]
    step: StepBytes
    context: int
    filling: int = 0
    host: int = 0

    @property
    def weights(self) -> int:
        """All parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would tell."""
        return max(self.weights + self.step.peak, self.filling)

    @property
    def training(self) -> int:
        """What a step of training needs of the card."""
        return self.weights + self.step.peak + self.context

    @property
    def total(self) -> int:
        """What the card must have."""
        return self.allocated + self.context

    def verdict(self, card_gb: float) -> str:
        """fits, tight (it may fail by fragmentation), or no."""
        usable = usable_bytes(card_gb)
        if self.total > usable:
            return "no"
        return "fits" if self.fits(usable) else "tight"

    def fits(self, usable: int) -> bool:
        """Whether so many bytes are enough, fragmentation included."""
        return self.total * (1 + FRAGMENTS) <= usable


class Planner:
    """Estimates variants of one run; every skeleton is built once, every step traced once."""

    def __init__(self, cfg: Config, on_gpu: bool, ranks: Ranks | None = None) -> None:
        self.cfg, self.on_gpu, self.ranks = cfg, on_gpu, Ranks() if ranks is None else ranks
        self._tracer = StepTracer(registry.get("task", cfg.run.task)(), on_gpu)
        self._skeletons: dict[Variant, GenerationMixin] = {}
        self._parts: dict[Variant, tuple[PartBytes, ...]] = {}
        self._fillings: dict[Variant, tuple[int, torch.Size]] = {}
        self._estimates: dict[tuple[Variant, Row], Estimate] = {}

    def skeleton(self, variant: Variant) -> GenerationMixin:
        """The model of a variant on the meta device."""
        if variant.skeleton not in self._skeletons:
            model = build_skeleton(self.cfg, variant, self.on_gpu)
            self._skeletons[variant.skeleton] = model
            # now: quantised weights change in their first run
            for cached, gone in ((False, []), (True, self._gone(model))):
                self._parts[replace(variant.skeleton, cached=cached)] = tuple(parts_of(model, gone))
        return self._skeletons[variant.skeleton]

    def weights(self, variant: Variant) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts(variant))

    def parts(self, variant: Variant) -> tuple[PartBytes, ...]:
        """What one GPU holds between two rows."""
        if variant not in self._parts:
            model = self.skeleton(variant)
            if variant not in self._parts:  # that of a split model
                gone = self._gone(model) if variant.cached else []
                with _as_in_training(model, variant):
                    self._parts[variant] = tuple(parts_of(model, gone, variant.shards, left_whole(model)))
        return self._parts[variant]

    def estimate(self, variant: Variant, row: Row) -> Estimate:
        """Prediction for one kind of row."""
        key = (variant, row)
        if key not in self._estimates:
            parts, model = self.parts(variant), self.skeleton(variant)
            side, filling = model.cfg.image_size, 0
            images: Sequence[int] = (3, side, side)
            dtype = torch.float32
            if variant.cached:
                filling, shape = self._filling(variant)
                images, dtype = shape[1:], model.dtype
            has_buckets = self.ranks.count > 1 and variant.shards == 1  # of DDP
            with _as_in_training(model, variant):
                batch = row.batch(images, dtype)
                step = self._tracer.trace(model, batch, row.adds_up or has_buckets, variant.shards)
            context = CONTEXT if self.on_gpu else 0
            host = host_bytes(model, self.ranks) if variant.shards > 1 else 0
            self._estimates[key] = Estimate(variant, row, parts, step, context, filling, host)
        return self._estimates[key]

    def picture_bytes(self, variant: Variant) -> int:
        """Of the features of one picture in a vision cache."""
        shape = self._filling(variant)[1]
        return shape[1] * shape[2] * variant.dtype.itemsize

    def _gone(self, model: GenerationMixin) -> list[str]:
        """Children that leave the device once the vision cache is full; on a CPU those without a file stay."""
        return [name for name, is_kept in releasable(model) if self.on_gpu or not is_kept]

    def _filling(self, variant: Variant) -> tuple[int, torch.Size]:
        """Bytes of tensors while the vision cache is filled, and the shape of features [N, P, C']."""
        key = replace(variant, cached=True)
        if key not in self._fillings:
            model = self.skeleton(variant)
            traced, shape = self._tracer.fill(model)
            # a model that will be split is in one piece, its language model still in host memory
            is_elsewhere = variant.shards > 1 and self.on_gpu
            held = parts_of(model, ["llama_model"]) if is_elsewhere else self.parts(variant.skeleton)
            weights = sum(part.bytes for part in held)
            if self.ranks.count > 1 and variant.shards == 1:  # DDP makes its buckets before
                weights += sum(p.nbytes for p in model.parameters() if p.requires_grad)
            self._fillings[key] = (weights + traced, shape)
        return self._fillings[key]

    def line(self, variant: Variant, row: Row) -> tuple[int, int]:
        """What training on a row of one sample needs of the card, and bytes of each further sample."""
        few, more = (self.estimate(variant, row.with_samples(samples)).training for samples in _LINE)
        return few, (more - few) // (_LINE[1] - _LINE[0])

    def most_samples(self, variant: Variant, row: Row, usable: int) -> int:
        """About how many samples a row may hold; 0 when not even one fits."""
        first, further = self.line(variant, row)
        one = self.estimate(variant, row.with_samples(1))
        return 0 if max(first, one.filling + one.context) > usable else 1 + (usable - first) // max(further, 1)


@contextlib.contextmanager
def _as_in_training(model: GenerationMixin, variant: Variant) -> Iterator[None]:
    """The skeleton, which variants share, in the state that this one trains in."""
    model.reads_pixels, model.is_sharded = not variant.cached, variant.shards > 1
    try:
        yield
    finally:
        model.reads_pixels, model.is_sharded = True, False
