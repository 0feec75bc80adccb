"""95 % intervals by resampling (Efron 1979, percentile bootstrap): what another draw of held-out samples might give.

Samples that belong together (questions about one picture) are drawn together: taken as independent they would make
every interval too narrow. The seed is fixed, so the same numbers give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt4.metrics.accuracy import wilson_interval

Numbers = NDArray[np.float64]
Statistic = Callable[[Numbers], Numbers]
"""Weights of the samples, [R, N], how often each was drawn -> R values."""

RESAMPLES = 1000
"""Drawn for an interval; of many samples fewer (``_DRAWS``), whose ends then move less from draw to draw anyway."""
_DRAWS = 4_000_000
_LEAST_RESAMPLES = 200
SEED = 20
_CHUNK = 1 << 21
"""Weights held at once."""


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference of this size is more than chance, at 95 %."""
        return self.low > 0 or self.high < 0


def bootstrap(
    statistic: Statistic,
    count: int,
    groups: Sequence[Hashable] | None = None,
    resamples: int | None = None,
    seed: int = SEED,
) -> Interval:
    """Interval of ``statistic`` over ``count`` samples; ``groups`` names what is drawn together, one per sample.

    A resample for which the statistic is no number is left out. Raises ValueError for no samples, or for groups of
    another length.
    """
    if count < 1:
        raise ValueError("an interval needs at least one sample")
    if groups is not None and len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} samples")
    numbers: dict[Hashable, int] = {}
    unit = np.array([numbers.setdefault(group, len(numbers)) for group in (range(count) if groups is None else groups)])
    units = len(numbers)
    random = np.random.default_rng(seed)
    if resamples is None:
        resamples = max(_LEAST_RESAMPLES, min(RESAMPLES, _DRAWS // count))
    size = max(1, _CHUNK // count)
    values = []
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        places = random.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        drawn = np.bincount(places.ravel(), minlength=rows * units).reshape(rows, units)
        values.append(statistic(drawn[:, unit].astype(np.float64)))
    found = np.concatenate(values)
    found = found[np.isfinite(found)]
    value = float(statistic(np.ones((1, count)))[0])
    low, high = np.quantile(found, (0.025, 0.975)) if len(found) else (np.nan, np.nan)
    return Interval(value, float(low), float(high))


def mean_interval(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """Interval of the mean."""
    return bootstrap(_mean(np.asarray(values, dtype=np.float64)), len(values), groups)


def share_interval(is_right: Sequence[bool], groups: Sequence[Hashable] | None = None) -> Interval:
    """Interval of a share. Where all or none are right resampling says nothing, so Wilson's interval is given."""
    right = sum(is_right)
    if right in (0, len(is_right)) and is_right:
        units = len(set(groups)) if groups is not None else len(is_right)
        low, high = wilson_interval(units if right else 0, units)
        return Interval(1.0 if right else 0.0, low, high)
    return mean_interval([float(item) for item in is_right], groups)


def paired_difference(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable] | None = None
) -> Interval:
    """Interval of mean(second) - mean(first) over the same samples, drawn as pairs. Raises ValueError."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values for {len(second)}: a paired comparison needs the same samples")
    return mean_interval([b - a for a, b in zip(first, second, strict=True)], groups)


def macro_f1_interval(
    answers: Sequence[str], references: Sequence[str], groups: Sequence[Hashable] | None = None
) -> Interval:
    """Interval of the mean F1 over the labels among ``references``; any other answer is wrong.

    A resample counts the labels that it holds.
    """
    labels = {label: number for number, label in enumerate(dict.fromkeys(references))}
    truth = np.zeros((len(references), len(labels)))
    given = np.zeros_like(truth)
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        truth[row, labels[reference]] = 1
        if answer in labels:
            given[row, labels[answer]] = 1
    both = truth * given

    def statistic(weights: Numbers) -> Numbers:
        held = weights @ truth  # [R, labels]
        f1 = 2 * (weights @ both) / np.maximum(held + weights @ given, 1)
        present = held > 0
        result: Numbers = (f1 * present).sum(1) / np.maximum(present.sum(1), 1)
        return result

    return bootstrap(statistic, len(references), groups)


def _mean(values: Numbers) -> Statistic:
    def statistic(weights: Numbers) -> Numbers:
        result: Numbers = weights @ values / weights.sum(1)
        return result

    return statistic
