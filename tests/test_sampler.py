"""Which samples a window holds depends on the seed and the window, and on nothing else."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from itertools import pairwise

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.balance import permuted
from minigpt4.datasets.sampler import SampleKey, WindowSampler


def sampler(
    sizes: tuple[int, ...] = (50, 7, 1000),
    ratios: tuple[float, ...] = (30, 10, 20),
    batch_sizes: tuple[int, ...] = (2, 3, 4),
    accumulation: int = 4,
    world_size: int = 1,
    rank: int = 0,
    seed: int = 42,
) -> WindowSampler:
    return WindowSampler(sizes, ratios, batch_sizes, accumulation, world_size, rank, seed)


def test_a_window_is_the_same_whatever_was_asked_before() -> None:
    walked = sampler()
    windows = [walked.window(index) for index in range(40)]
    assert [len(window) for window in windows] == [4] * 40
    fresh = sampler()
    assert [fresh.window(index) for index in (39, 3, 20, 0, 39)] == [windows[index] for index in (39, 3, 20, 0, 39)]
    assert pickle.loads(pickle.dumps(walked)).window(17) == windows[17]
    assert sampler(seed=43).window(0) != windows[0]


def test_the_order_of_windows_is_pinned_so_that_old_runs_resume() -> None:
    drawn = [[(key.dataset, key.pass_index, key.index) for key in keys] for keys in sampler().window(3)]
    assert drawn == [
        [(0, 0, 9), (0, 0, 44)],
        [(1, 0, 3), (1, 0, 1), (1, 0, 5)],
        [(2, 0, 222), (2, 0, 167), (2, 0, 14), (2, 0, 752)],
        [(0, 0, 8), (0, 0, 37)],
    ]


def test_windows_of_any_length_cut_the_same_sequence() -> None:
    long, short = sampler(accumulation=9), sampler(accumulation=3)
    assert long.window(2) == [keys for index in (6, 7, 8) for keys in short.window(index)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_what_one_rank_with_a_longer_window_sees(world_size: int) -> None:
    alone = sampler(accumulation=4 * world_size)
    for index in range(10):
        shares = [sampler(world_size=world_size, rank=rank).window(index) for rank in range(world_size)]
        assert [shares[place % world_size][place // world_size] for place in range(4 * world_size)] == alone.window(
            index
        )


def test_sample_ratio_decides_how_often_a_set_is_drawn() -> None:
    one = sampler(ratios=(30, 10, 20), accumulation=100_000, batch_sizes=(1, 1, 1))
    counts = Counter(keys[0].dataset for keys in one.window(0))
    for dataset, share in enumerate((0.5, 1 / 6, 1 / 3)):
        assert counts[dataset] / 100_000 == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("ratios", [(0, 1, 0), (1e-300, 0, 1), (0, 0.1, 0.2)])
def test_a_set_with_ratio_zero_is_never_drawn(ratios: tuple[float, ...]) -> None:
    drawn = {keys[0].dataset for keys in sampler(ratios=ratios, accumulation=20_000, sizes=(5, 5, 5)).window(1)}
    assert all(ratios[dataset] > 0 for dataset in drawn)


def test_a_set_with_ratio_zero_may_be_empty() -> None:
    assert sampler(sizes=(5, 0), ratios=(1, 0), batch_sizes=(1, 1)).window(0)


@pytest.mark.parametrize(
    ("sizes", "ratios", "message"),
    [
        ((5, 5), (0, 0), "sample_ratio is 0 for every data set"),
        ((5, 5), (1, -1), ">= 0"),
        ((5, 0), (1, 1), "no samples"),
    ],
)
def test_ratios_that_cannot_be_drawn_are_refused(
    sizes: tuple[int, ...], ratios: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sampler(sizes=sizes, ratios=ratios, batch_sizes=(1, 1))


def test_a_pass_holds_every_sample_once_and_passes_differ() -> None:
    one = sampler(sizes=(50, 7), ratios=(2, 1), batch_sizes=(3, 2), accumulation=16)
    keys = [key for index in range(60) for keys in one.window(index) for key in keys]
    for dataset, size in enumerate((50, 7)):
        passes: dict[int, list[int]] = {}
        for key in keys:
            if key.dataset == dataset:
                passes.setdefault(key.pass_index, []).append(key.index)
        complete = [passes[number] for number in range(max(passes))]
        assert len(complete) > 5
        assert all(sorted(indices) == list(range(size)) for indices in complete)
        assert len({tuple(indices) for indices in complete}) > 0.9 * len(complete)
        assert len(set(passes[max(passes)])) == len(passes[max(passes)])


def test_samples_of_one_set_follow_each_other_over_windows_and_ranks() -> None:
    one = sampler(sizes=(10_000,), ratios=(1,), batch_sizes=(5,), accumulation=3, world_size=2, rank=1)
    expected = [SampleKey(0, 0, permuted(place, 10_000, 42, 0, 0)) for place in range(35, 40)]
    assert one.window(1)[0] == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_a_permutation_is_one_for_every_size(size: int) -> None:
    for pass_index in range(5):
        assert sorted(permuted(place, size, 1, 0, pass_index) for place in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [4, 5, 10])
def test_every_sample_is_as_likely_to_come_first(size: int) -> None:
    counts = Counter(permuted(0, size, 7, 0, pass_index) for pass_index in range(4000))
    expected = 4000 / size
    chi_square = sum((counts[index] - expected) ** 2 / expected for index in range(size))
    assert chi_square < 40  # 27.9 is the 0.1 % bound for nine degrees of freedom; the draw is fixed


def test_neighbours_in_the_file_are_not_neighbours_in_the_pass() -> None:
    order = [permuted(place, 5000, 3, 0, 0) for place in range(5000)]
    steps = Counter(after - before for before, after in pairwise(order))
    assert max(steps.values()) < 12


def test_data_sets_of_one_size_have_orders_of_their_own() -> None:
    assert [permuted(n, 100, 1, 0, 0) for n in range(9)] != [permuted(n, 100, 1, 1, 0) for n in range(9)]


def test_expected_samples_follow_the_ratios() -> None:
    assert sampler().expected_samples_per_micro_batch() == pytest.approx((30 * 2 + 10 * 3 + 20 * 4) / 60)
    assert sampler(ratios=(0, 1, 0)).expected_samples_per_micro_batch() == 3


def test_a_late_window_of_many_large_sets_comes_in_a_second() -> None:
    late = sampler((15_000_000,) * 25, tuple(range(1, 26)), (6,) * 25, accumulation=8, world_size=8, rank=5)
    begin = time.process_time()
    assert len(late.window(400_000)) == 8
    assert time.process_time() - begin < 3  # under one second on an idle core
