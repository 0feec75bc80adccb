"""Which samples a window holds: a pure function of (seed, window), for any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.balance import BalancedOrder, Groups, PlainOrder

_CHUNK = 1 << 20
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SampleKey:
    """One sample: number of the data set, how often its set (or its group) was passed through before, index in it."""

    dataset: int
    pass_index: int
    index: int


class WindowSampler:
    """Mixes data sets by ratio.

    Window w is the micro-batches ``[w * G, (w + 1) * G)`` of one endless sequence, G = accumulation x world size.
    Micro-batch m draws a data set by ratio from word m of a counter-based generator (Philox, Salmon et al. 2011) and
    takes that set's next ``batch_size`` samples; each pass through a set is a new permutation, of its records or, with
    ``groups``, of what is due to each group (see BalancedOrder). Rank r takes every world-th micro-batch, so N ranks
    see what one rank with N-fold accumulation sees.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        ratios: Sequence[float],
        batch_sizes: Sequence[int],
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        groups: Sequence[Groups | None] = (),
    ) -> None:
        assert len(sizes) == len(ratios) == len(batch_sizes) and 0 <= rank < world_size and accumulation > 0
        if any(ratio < 0 for ratio in ratios):
            raise ConfigError(f"sample_ratio must be >= 0, got {list(ratios)}")
        self._active = [number for number, ratio in enumerate(ratios) if ratio > 0]
        if not self._active:
            raise ConfigError("sample_ratio is 0 for every data set; nothing would be drawn")
        empty = [number for number in self._active if sizes[number] < 1]
        if empty:
            raise ConfigError(f"data set number {empty[0]} has no samples")
        weights = np.array([ratios[number] for number in self._active], dtype=np.float64)
        self._shares = weights / weights.sum()
        # whole numbers of 64 bits, so that drawn words are compared as they are
        self._edges = np.array(
            [min(int(edge * 2**64), _MASK) for edge in np.cumsum(self._shares)[:-1]], dtype=np.uint64
        )
        self._batch_sizes = list(batch_sizes)
        self._orders = {
            number: BalancedOrder(chosen, seed, number) if chosen else PlainOrder(sizes[number], seed, number)
            for number in self._active
            for chosen in [groups[number] if groups else None]
        }
        self._accumulation, self.world_size, self.rank = accumulation, world_size, rank
        self._seed = seed
        self._known = (0, np.zeros(len(self._active), dtype=np.int64))  # memo: counts before a micro-batch

    def window(self, index: int) -> list[list[SampleKey]]:
        """This rank's micro-batches of window ``index``."""
        total = self._accumulation * self.world_size
        start = index * total
        counts = self._counts_before(start).copy()
        mine = []
        for place, drawn in enumerate(self._draws(start, total)):
            if place % self.world_size == self.rank:
                mine.append(self._samples(self._active[drawn], int(counts[drawn])))
            counts[drawn] += 1
        return mine

    def expected_samples_per_micro_batch(self) -> float:
        """Mean number of samples, by the ratios."""
        sizes = [self._batch_sizes[number] for number in self._active]
        return float(np.dot(self._shares, sizes))

    @property
    def shares(self) -> list[float]:
        """Chance of each data set to be drawn, 0 for those that are left out."""
        known = dict(zip(self._active, self._shares, strict=True))
        return [float(known.get(number, 0.0)) for number in range(len(self._batch_sizes))]

    def _samples(self, dataset: int, batches_before: int) -> list[SampleKey]:
        order, size = self._orders[dataset], self._batch_sizes[dataset]
        numbers = range(batches_before * size, (batches_before + 1) * size)
        return [SampleKey(dataset, *order.drawn(number)) for number in numbers]

    def _draws(self, start: int, count: int) -> NDArray[np.intp]:
        """Positions in ``_active`` for micro-batches [start, start + count)."""
        skipped = start % 4  # one step of the counter yields four words
        generator = np.random.Philox(key=self._seed & _MASK, counter=start // 4)
        return np.searchsorted(self._edges, generator.random_raw(skipped + count)[skipped:], side="right")

    def _counts_before(self, start: int) -> NDArray[np.int64]:
        """How often each active set was drawn before micro-batch ``start``; counted, not remembered."""
        begin, counts = self._known if self._known[0] <= start else (0, np.zeros_like(self._known[1]))
        while begin < start:
            size = min(_CHUNK, start - begin)
            counts = counts + np.bincount(self._draws(begin, size), minlength=len(counts))
            begin += size
        self._known = (start, counts)
        return counts
