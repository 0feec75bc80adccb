"""Scores of labels, all from one table of counts.

A table is [..., L, L + 1]: rows are the references, columns the labels that were given, and the last column counts
answers without a usable label. Those are wrong in every score.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from minigpt4.metrics.intervals import Interval, Numbers, Statistic, bootstrap, share_interval

Score = Callable[[Numbers], Numbers]
"""Tables [..., L, L + 1] -> a number each, [...]."""


def count_table(
    references: Sequence[int], given: Sequence[int | None], num_labels: int, weights: Numbers | None = None
) -> Numbers:
    """Table [L, L + 1]; with ``weights`` [R, N] one table per row of them, [R, L, L + 1]. Given None = no label.

    Raises ValueError for lists of different lengths.
    """
    if len(references) != len(given):
        raise ValueError(f"{len(given)} answers for {len(references)} references")
    columns = [num_labels if label is None else label for label in given]
    cells = np.asarray(references, dtype=np.int64) * (num_labels + 1) + np.asarray(columns, dtype=np.int64)
    size, shape = num_labels * (num_labels + 1), (num_labels, num_labels + 1)
    if weights is None:
        return np.bincount(cells, minlength=size).astype(np.float64).reshape(shape)
    return np.stack([np.bincount(cells, row, minlength=size).reshape(shape) for row in weights])


def accuracy(table: Numbers) -> Numbers:
    """Share of right labels."""
    result: Numbers = _right(table).sum(-1) / table.sum((-2, -1))
    return result


def recalls(table: Numbers) -> Numbers:
    """Right share of every label's references, [..., L]; nan for labels that do not occur."""
    with np.errstate(invalid="ignore"):
        result: Numbers = _right(table) / table.sum(-1)
    return result


def precisions(table: Numbers) -> Numbers:
    """Right share of the answers that give a label, [..., L]; nan for labels that nobody gave."""
    with np.errstate(invalid="ignore"):
        result: Numbers = _right(table) / table.sum(-2)[..., :-1]
    return result


def f1_scores(table: Numbers) -> Numbers:
    """Harmonic mean of precision and recall per label, [..., L]; 0 for labels that are never right."""
    total = table.sum(-1) + table.sum(-2)[..., :-1]
    result: Numbers = 2 * _right(table) / np.maximum(total, 1)
    return result


def balanced_accuracy(table: Numbers) -> Numbers:
    """Mean recall over the labels that occur: rare ones count as much as frequent ones."""
    return _over_occurring(recalls(table), table)


def macro_f1(table: Numbers) -> Numbers:
    """Mean F1 over the labels that occur among the references."""
    return _over_occurring(f1_scores(table), table)


def weighted_f1(table: Numbers) -> Numbers:
    """Mean F1, labels weighted by how often they occur."""
    result: Numbers = (f1_scores(table) * table.sum(-1)).sum(-1) / table.sum((-2, -1))
    return result


def mean_absolute_error(table: Numbers) -> Numbers:
    """Mean distance in steps of an ordered scale; an answer without a label counts as the furthest end."""
    return _mean_of(table, _distances(table.shape[-2]))


def within_one(table: Numbers) -> Numbers:
    """Share of answers at most one step of an ordered scale away."""
    return _mean_of(table, (_distances(table.shape[-2], no_label=np.inf) <= 1).astype(np.float64))


def majority_share(table: Numbers) -> float:
    """What always giving the most frequent reference would be right in."""
    return float(table.sum(-1).max() / table.sum())


def table_interval(
    score: Score,
    references: Sequence[int],
    given: Sequence[int | None],
    num_labels: int,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """95 % interval of a score; accuracy where all or none are right has Wilson's."""
    if score is accuracy:
        return share_interval([a == b for a, b in zip(given, references, strict=True)], groups)
    return bootstrap(_resampled(score, references, given, num_labels), len(references), groups)


def paired_score_difference(
    score: Score,
    references: Sequence[int],
    given: tuple[Sequence[int | None], Sequence[int | None]],
    num_labels: int,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Interval of score(second) - score(first) over the same samples, drawn together (Efron and Tibshirani 1993)."""
    first, second = (_resampled(score, references, labels, num_labels) for labels in given)
    return bootstrap(lambda weights: second(weights) - first(weights), len(references), groups)


def _resampled(score: Score, references: Sequence[int], given: Sequence[int | None], num_labels: int) -> Statistic:
    return lambda weights: score(count_table(references, given, num_labels, weights))


def _right(table: Numbers) -> Numbers:
    return np.diagonal(table, axis1=-2, axis2=-1)


def _over_occurring(values: Numbers, table: Numbers) -> Numbers:
    """Mean of ``values`` [..., L] over the labels with references."""
    occurs = table.sum(-1) > 0
    result: Numbers = np.where(occurs, values, 0.0).sum(-1) / occurs.sum(-1)
    return result


def _distances(num_labels: int, no_label: float | None = None) -> Numbers:
    """Steps between labels, [L, L + 1]; the last column is ``no_label``, or the furthest end of the scale."""
    steps = np.arange(num_labels, dtype=np.float64)
    last = np.maximum(steps, num_labels - 1 - steps) if no_label is None else np.full(num_labels, no_label)
    return np.column_stack([np.abs(steps[:, None] - steps), last])


def _mean_of(table: Numbers, values: Numbers) -> Numbers:
    result: Numbers = (table * values).sum((-2, -1)) / table.sum((-2, -1))
    return result
