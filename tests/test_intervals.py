"""Intervals against values that are known without resampling."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt4.metrics.intervals import (
    Interval,
    bootstrap,
    macro_f1_interval,
    mean_interval,
    paired_difference,
    share_interval,
)


def test_a_mean_has_the_interval_of_the_normal_law() -> None:
    values = [0.0, 1.0] * 200
    found = mean_interval(values)  # standard error sqrt(0.25 / 400) = 0.025
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)


def test_two_samples_have_three_possible_means() -> None:
    assert mean_interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)  # 0, 0.5 and 1 with 1/4, 1/2 and 1/4
    assert mean_interval([3.0, 3.0]) == Interval(3.0, 3.0, 3.0)


def test_the_same_numbers_give_the_same_interval_and_another_seed_another() -> None:
    values = [float(number % 7) for number in range(50)]
    assert mean_interval(values) == mean_interval(values)

    def mean(weights: Any) -> Any:
        return weights @ values / weights.sum(1)

    assert bootstrap(mean, 50, seed=1) != bootstrap(mean, 50, seed=2)


def test_questions_about_one_picture_count_as_one_draw() -> None:
    single = [0.0, 1.0] * 20
    repeated = [value for value in single for _ in range(10)]
    groups = [number // 10 for number in range(400)]
    alone, together = mean_interval(single), mean_interval(repeated, groups)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    apart = mean_interval(repeated)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_all_right_of_few_is_no_certainty() -> None:
    found = share_interval([True] * 10)
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(0.722, abs=0.001)
    assert share_interval([True] * 10, [0] * 10).low == pytest.approx(0.207, abs=0.001)  # one picture
    assert share_interval([False] * 10).high == pytest.approx(0.278, abs=0.001)


def test_pairs_show_a_difference_that_two_intervals_hide() -> None:
    first = [float(number % 10) for number in range(40)]
    second = [value + 0.5 for value in first]
    difference = paired_difference(first, second)
    assert difference == Interval(0.5, 0.5, 0.5) and difference.excludes_zero
    assert mean_interval(first).high > mean_interval(second).low
    assert not paired_difference([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]).excludes_zero
    with pytest.raises(ValueError, match="3 values for 2"):
        paired_difference([0, 1, 1], [0, 1])


def test_macro_f1_is_that_of_scikit_learn() -> None:
    from minigpt4.metrics.answers import macro_f1

    references = ["joy"] * 9 + ["fear"] * 3
    answers = ["joy"] * 8 + ["fear"] * 3 + ["banana"]
    found = macro_f1_interval(answers, references)
    assert found.value == pytest.approx(macro_f1(answers, references))
    assert found.low < found.value < found.high <= 1.0
    assert macro_f1_interval(references, references) == Interval(1.0, 1.0, 1.0)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        mean_interval([])
    with pytest.raises(ValueError, match="2 groups for 3 samples"):
        mean_interval([1, 2, 3], ["a", "b"])
