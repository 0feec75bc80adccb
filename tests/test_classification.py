"""Scores of labels and groups against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt4.metrics import classification as table
from minigpt4.metrics.answers import METRICS
from minigpt4.metrics.groups import compare_groups

REFERENCES = [0, 0, 0, 0, 1, 1, 2, 2]
GIVEN = [0, 0, 1, None, 1, 0, 2, None]
COUNTS = table.count_table(REFERENCES, GIVEN, 3)


def test_answers_without_a_label_stand_in_the_last_column() -> None:
    assert COUNTS.tolist() == [[2, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]


def test_scores_are_those_of_the_definitions() -> None:
    assert float(table.accuracy(COUNTS)) == 4 / 8
    assert table.recalls(COUNTS).tolist() == [0.5, 0.5, 0.5]
    assert table.precisions(COUNTS).tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    f1 = [4 / 7, 2 / 4, 2 / 3]
    assert table.f1_scores(COUNTS).tolist() == pytest.approx(f1)
    assert float(table.balanced_accuracy(COUNTS)) == 0.5
    assert float(table.macro_f1(COUNTS)) == pytest.approx(sum(f1) / 3)
    assert float(table.weighted_f1(COUNTS)) == pytest.approx((4 * f1[0] + 2 * f1[1] + 2 * f1[2]) / 8)
    assert table.majority_share(COUNTS) == 0.5


def test_labels_that_do_not_occur_count_in_no_mean() -> None:
    counts = table.count_table([0, 0], [0, 2], 4)
    assert float(table.balanced_accuracy(counts)) == 0.5
    assert float(table.macro_f1(counts)) == pytest.approx(2 / 3)


def test_distances_on_a_scale_take_no_answer_as_the_furthest() -> None:
    counts = table.count_table([0, 1, 3, 1], [1, 1, 0, None], 4)  # 1, 0, 3, and 2 from 1 to the far end
    assert float(table.mean_absolute_error(counts)) == (1 + 0 + 3 + 2) / 4
    assert float(table.within_one(counts)) == 2 / 4


def test_a_paired_difference_is_more_certain_than_two_intervals() -> None:
    references = [0, 1] * 30
    worse: list[int | None] = [None if i % 5 == 0 else label for i, label in enumerate(references)]
    found = table.paired_score_difference(table.macro_f1, references, (worse, references), 2)
    assert 0 < found.low < found.value < found.high
    own = table.table_interval(table.balanced_accuracy, references, worse, 2)
    assert own.value == pytest.approx(0.8) and own.low < 0.8 < own.high
    assert table.table_interval(table.accuracy, references, references, 2).low < 1.0  # Wilson
    same = table.paired_score_difference(table.macro_f1, references, (worse, worse), 2)
    assert (same.low, same.high) == (0, 0)


def test_a_real_gap_between_groups_is_told_from_chance() -> None:
    pictures = list(range(120))
    groups = ["a"] * 50 + ["b"] * 50 + ["few"] * 19 + [""]
    values = [1.0] * 45 + [0.0] * 5 + [1.0] * 25 + [0.0] * 25 + [1.0] * 20
    found = compare_groups(values, groups, pictures)
    assert found.small == {"few": 19} and list(found.groups) == ["a", "b"]
    assert found.groups["a"][0] == 50 and found.groups["a"][1].value == 0.9
    assert found.gap is not None and found.gap.value == pytest.approx(0.4) and found.gap.low > 0.2
    assert found.chance is not None and found.chance < 0.01
    even = compare_groups([float(i % 2) for i in range(100)], ["a", "a", "b", "b"] * 25, pictures[:100])
    assert even.gap is not None and even.gap.value < 0.05 and even.chance is not None and even.chance > 0.5


def test_answers_about_one_picture_are_shuffled_together() -> None:
    values = np.repeat([1.0, 0.0, 1.0, 0.0], 25).tolist()
    pictures = np.repeat([0, 1, 2, 3], 25).tolist()
    groups = ["a", "b", "a", "b"]
    found = compare_groups(values, [groups[picture] for picture in pictures], pictures)
    assert found.gap is not None and found.gap.value == 1.0
    assert found.chance is not None and found.chance > 0.2  # 2 of 6 divisions of four pictures
    one = compare_groups([1.0] * 20, ["a"] * 20, list(range(20)))
    assert list(one.groups) == ["a"] and one.gap is None and one.chance is None
    with pytest.raises(ValueError, match="1 values, 2 groups"):
        compare_groups([1.0], ["a", "b"], [1])


def test_balanced_accuracy_is_a_metric_of_training() -> None:
    score = METRICS["balanced_accuracy"].score
    assert score(["Joy.", "fear", "joy"], ["joy", "joy", "fear"]) == 0.25
