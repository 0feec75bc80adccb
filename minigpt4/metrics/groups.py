"""Scores of groups of people and the gap between them, with what chance alone would make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt4.metrics.intervals import RESAMPLES, SEED, Interval, Numbers, bootstrap, mean_interval, share_interval

Places = NDArray[np.int64]
"""Number of each sample's group."""


@dataclass(frozen=True)
class GroupScores:
    """What ``compare_groups`` found.

    groups    group -> its number of samples and its mean with interval; in the order of their names.
    small     groups of fewer samples than the minimum -> their number; they are in no comparison.
    gap       highest mean minus lowest with its bootstrap interval; None for fewer than two groups. It is never below
              0 and is drawn upwards by noise, the more so the smaller the groups are; so read ``chance`` with it.
    chance    share of 1,000 shuffles of the groups over the pictures that make a gap at least as large.
    """

    groups: dict[str, tuple[int, Interval]]
    small: dict[str, int]
    gap: Interval | None = None
    chance: float | None = None


def compare_groups(
    values: Sequence[float], members: Sequence[str], pictures: Sequence[Hashable], min_size: int = 20
) -> GroupScores:
    """Means of ``values`` per group; ``members`` names the group of each, '' = none. Raises ValueError.

    Values about one picture are drawn and shuffled together.
    """
    if not len(values) == len(members) == len(pictures):
        raise ValueError(f"{len(values)} values, {len(members)} groups, {len(pictures)} pictures")
    sizes = {name: size for name, size in sorted(Counter(members).items()) if name}
    large = [name for name, size in sizes.items() if size >= min_size]
    groups = {}
    for name in large:
        chosen = [i for i, member in enumerate(members) if member == name]
        groups[name] = (sizes[name], _interval([values[i] for i in chosen], [pictures[i] for i in chosen]))
    small = {name: size for name, size in sizes.items() if size < min_size}
    if len(large) < 2:
        return GroupScores(groups, small)
    kept = [i for i, member in enumerate(members) if member in groups]
    numbers = np.asarray([values[i] for i in kept], dtype=np.float64)
    place = np.asarray([large.index(members[i]) for i in kept], dtype=np.int64)
    units = [pictures[i] for i in kept]
    return GroupScores(
        groups, small, _gap_interval(numbers, place, units, len(large)), _chance(numbers, place, units, len(large))
    )


def _interval(values: Sequence[float], pictures: Sequence[Hashable]) -> Interval:
    if set(values) <= {0.0, 1.0}:
        return share_interval([value == 1.0 for value in values], pictures)
    return mean_interval(values, pictures)


def _gap_interval(values: Numbers, place: Places, units: Sequence[Hashable], count: int) -> Interval:
    is_in = np.eye(count)[place]  # [N, G]

    def statistic(weights: Numbers) -> Numbers:
        with np.errstate(invalid="ignore"):
            means = (weights * values) @ is_in / (weights @ is_in)  # [R, G]; nan where a group was not drawn
        result: Numbers = means.max(1) - means.min(1)
        return result

    return bootstrap(statistic, len(values), units)


def _chance(values: Numbers, place: Places, units: Sequence[Hashable], count: int) -> float:
    """The group is shuffled over (picture, group) pairs, so that what belongs together stays together."""
    numbers: dict[Hashable, int] = {}
    unit = np.asarray([numbers.setdefault(key, len(numbers)) for key in zip(units, place.tolist(), strict=True)])
    sums, sizes = np.bincount(unit, values), np.bincount(unit)
    group_of = np.zeros(len(numbers), dtype=np.int64)
    group_of[unit] = place

    def gap(groups: Places) -> float:
        means = np.bincount(groups, sums, count) / np.maximum(np.bincount(groups, sizes, count), 1)
        return float(means.max() - means.min())

    random, found = np.random.default_rng(SEED), gap(group_of)
    at_least = sum(gap(random.permutation(group_of)) >= found - 1e-12 for _ in range(RESAMPLES))
    return (at_least + 1) / (RESAMPLES + 1)
