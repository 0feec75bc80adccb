"""Predicted memory of one GPU for a variant of the run and a row, and which cards hold it."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.common.schema import Config
from minigpt4.models.generation import GenerationMixin
from minigpt4.tools.planner.skeleton import PartBytes, Variant, build_skeleton, parts_of
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
    """Bytes of one GPU at the fullest moment. context: what PyTorch does not count."""

    variant: Variant
    row: Row
    parts: tuple[PartBytes, ...]
    step: StepBytes
    context: int

    @property
    def weights(self) -> int:
        """All parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would tell."""
        return self.weights + self.step.peak

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

    def __init__(self, cfg: Config, on_gpu: bool) -> None:
        self.cfg, self.on_gpu = cfg, on_gpu
        self._tracer = StepTracer(registry.get("task", cfg.run.task)(), on_gpu)
        self._skeletons: dict[Variant, tuple[GenerationMixin, tuple[PartBytes, ...]]] = {}
        self._estimates: dict[tuple[Variant, Row], Estimate] = {}

    def skeleton(self, variant: Variant) -> GenerationMixin:
        """The model of a variant on the meta device."""
        return self._built(variant)[0]

    def weights(self, variant: Variant) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self._built(variant)[1])

    def estimate(self, variant: Variant, row: Row) -> Estimate:
        """Prediction for one kind of row."""
        key = (variant, row)
        if key not in self._estimates:
            model, parts = self._built(variant)
            step = self._tracer.trace(model, variant.dtype, row.batch(self.cfg.model.image_size), row.adds_up)
            self._estimates[key] = Estimate(variant, row, parts, step, CONTEXT if self.on_gpu else 0)
        return self._estimates[key]

    def line(self, variant: Variant, row: Row) -> tuple[int, int]:
        """Total of a row of one sample, and bytes of each further sample."""
        few, more = (self.estimate(variant, row.with_samples(samples)) for samples in _LINE)
        return few.total, (more.total - few.total) // (_LINE[1] - _LINE[0])

    def most_samples(self, variant: Variant, row: Row, usable: int) -> int:
        """About how many samples a row may hold; 0 when not even one fits."""
        first, further = self.line(variant, row)
        return 0 if first > usable else 1 + (usable - first) // max(further, 1)

    def _built(self, variant: Variant) -> tuple[GenerationMixin, tuple[PartBytes, ...]]:
        if variant not in self._skeletons:
            model = build_skeleton(self.cfg, variant, self.on_gpu)
            self._skeletons[variant] = (model, tuple(parts_of(model)))
        return self._skeletons[variant]
