"""Balanced order of one data set: how often each group of records is drawn, as a pure function of a counter."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 6


@dataclass(frozen=True)
class Groups:
    """Records sorted into groups: ``names``, and per record the number of its name, [size]; how to draw them.

    ``temperature`` 1 draws groups as often as the data hold them, 0 all equally often: size ** temperature.
    """

    names: tuple[str, ...]
    of_record: NDArray[np.integer]
    temperature: float

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Records per group."""
        return np.bincount(self.of_record, minlength=len(self.names))

    def quotas(self) -> NDArray[np.int64]:
        """Draws per group in one pass of as many draws as there are records; none is 0. By largest remainder."""
        size = len(self.of_record)
        weights = self.sizes.astype(np.float64) ** self.temperature
        exact = weights / weights.sum() * size
        whole: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
        left = size - int(whole.sum())
        if left > 0:
            whole[np.argsort(whole - exact, kind="stable")[:left]] += 1
        return whole


class PlainOrder:
    """Every pass is a permutation of the whole data set."""

    def __init__(self, size: int, seed: int, dataset: int) -> None:
        self._size, self._seed, self._dataset = size, seed, dataset

    def drawn(self, number: int) -> tuple[int, int]:
        """Pass and index of draw ``number``."""
        pass_index, place = divmod(number, self._size)
        return pass_index, permuted(place, self._size, self._seed, self._dataset, pass_index)


class BalancedOrder:
    """A pass is a permutation of the groups' quotas; each group goes through passes of its own.

    A pass has as many draws as the set has records, and holds every group exactly as often as its quota says. Draw k of
    a group is place k of that group's own endless sequence of permutations: every record of a group is drawn once
    before the group's pass is over. Nothing is counted, so any draw is found in the same time.
    """

    def __init__(self, groups: Groups, seed: int, dataset: int) -> None:
        self._size, self._seed, self._dataset = len(groups.of_record), seed, dataset
        self._quotas = groups.quotas()
        self._ends = np.cumsum(self._quotas)
        self._sizes = groups.sizes
        self._starts = np.cumsum(self._sizes) - self._sizes
        kind = np.min_scalar_type(self._size)
        self._members = np.argsort(groups.of_record, kind="stable").astype(kind)  # records group by group

    def drawn(self, number: int) -> tuple[int, int]:
        """Pass of the group and index of draw ``number``."""
        pass_index, place = divmod(number, self._size)
        slot = permuted(place, self._size, self._seed, self._dataset, pass_index)
        group = int(np.searchsorted(self._ends, slot, side="right"))
        quota = int(self._quotas[group])
        count = pass_index * quota + slot - (int(self._ends[group]) - quota)  # draws of the group that come before
        group_pass, member = divmod(count, size := int(self._sizes[group]))
        inner = permuted(member, size, self._seed, f"{self._dataset}/{group}", group_pass)
        return group_pass, int(self._members[int(self._starts[group]) + inner])


def permuted(place: int, size: int, seed: int, stream: int | str, pass_index: int) -> int:
    """The index at ``place`` of one pass's permutation of ``range(size)``, without storing it.

    A Feistel network over the next power of four, walked until it lands inside (Black and Rogaway, 2002).
    ``stream``: what the order belongs to, a data set or a group of it.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(seed, stream, pass_index)
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=1024)
def _round_keys(seed: int, stream: int | str, pass_index: int) -> tuple[int, ...]:
    digest = hashlib.sha512(f"{seed}/{stream}/{pass_index}".encode()).digest()
    return struct.unpack(f"<{_ROUNDS}Q", digest[: 8 * _ROUNDS])


def _mixed(value: int) -> int:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def group_records(values: Sequence[str], temperature: float) -> Groups:
    """Groups of records with equal ``values``, in the order of their names: the order of a file changes nothing."""
    names, inverse = np.unique(np.array(values, dtype=object).astype(str), return_inverse=True)
    return numbered_groups(list(map(str, names)), inverse, temperature)


def numbered_groups(names: Sequence[str], of_record: NDArray[np.integer], temperature: float) -> Groups:
    """Groups of records whose number in ``names`` is known, in as little memory as holds it."""
    return Groups(tuple(names), of_record.astype(np.min_scalar_type(len(names))), temperature)
