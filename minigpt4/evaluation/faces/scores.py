"""Answered cases -> scores, section by section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt4.evaluation.faces.cases import LETTERS, Case
from minigpt4.evaluation.faces.label_sets import ATTRIBUTES
from minigpt4.metrics import classification as table
from minigpt4.metrics.answers import rouge_l_each
from minigpt4.metrics.groups import compare_groups
from minigpt4.metrics.intervals import Interval, mean_interval
from minigpt4.metrics.labels import (
    AMBIGUOUS,
    LABEL,
    NONE,
    REFUSAL,
    Extracted,
    attribute_recall,
    chosen_option,
    is_refusal,
)

ERROR = "error"
_INTERVALS = {
    "accuracy": table.accuracy,
    "balanced_accuracy": table.balanced_accuracy,
    "macro_f1": table.macro_f1,
}
LABEL_SCORES: Mapping[str, table.Score] = {**_INTERVALS, "weighted_f1": table.weighted_f1}
ORDINAL_SCORES: Mapping[str, table.Score] = {
    "mean_absolute_error": table.mean_absolute_error,
    "within_one": table.within_one,
}


@dataclass(frozen=True)
class Row:
    """A case with its answer.

    label       number of the answer among the case's names, if it gives exactly one. ``status``: see ``Extracted``, or
                'error' where there is no answer.
    scores      of free text: rouge_l, attribute_recall where the reference names attributes.
    likelihoods per name, where answers were compared and not written.
    """

    case: Case
    answer: str
    label: int | None = None
    status: str = LABEL
    scores: Mapping[str, float] = field(default_factory=dict)
    likelihoods: tuple[float, ...] = ()
    error: str = ""

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is the reference; None for free text."""
        return None if self.case.target is None else self.label == self.case.target

    @property
    def value(self) -> float:
        """1 or 0 for a label, ROUGE-L for text: what groups and runs are compared by."""
        return self.scores["rouge_l"] if self.is_right is None else float(self.is_right)

    def record(self) -> dict[str, Any]:
        """The line of a predictions file; ``minigpt4 report`` reads it."""
        case = self.case
        line: dict[str, Any] = {
            "id": case.id,
            "images": list(case.images),
            "question": case.question,
            "answer": self.answer,
            "reference": case.reference,
            "section": case.section,
        }
        line |= {} if self.is_right is None else {"correct": self.is_right}
        label = None if self.label is None else case.names[self.label]
        line["extracted"] = {"kind": case.kind, "status": self.status, "label": label}
        line |= {"scores": dict(self.scores)} if self.scores else {}
        if self.likelihoods:
            line["likelihoods"] = dict(zip(case.names, self.likelihoods, strict=True))
        line |= {"error": self.error} if self.error else {}
        return line | ({"meta": dict(case.meta)} if case.meta else {})


def read_rows(cases: Sequence[Case], answers: Sequence[str], errors: Sequence[str]) -> list[Row]:
    """Labels and text scores of generated answers; ``errors``: why there is no answer, else ''."""
    rows = []
    is_text = [not case.names and not error for case, error in zip(cases, errors, strict=True)]
    texts = [number for number, chosen in enumerate(is_text) if chosen]
    overlaps = dict(
        zip(texts, rouge_l_each([answers[i] for i in texts], [cases[i].reference for i in texts]), strict=True)
    )
    for number, (case, answer, error) in enumerate(zip(cases, answers, errors, strict=True)):
        if error:
            rows.append(Row(case, answer, None, ERROR, error=error))
        elif case.names:
            found = extract(case, answer)
            rows.append(Row(case, answer, found.label, found.status))
        else:
            rows.append(_text_row(case, answer, overlaps[number]))
    return rows


def extract(case: Case, answer: str) -> Extracted:
    """The one name of the case that an answer gives."""
    if case.options:
        return chosen_option(answer, case.options)
    assert case.labels is not None, "free text has no labels"
    return case.labels.extract(answer)


def _text_row(case: Case, answer: str, overlap: float) -> Row:
    scores = {"rouge_l": overlap}
    recall = attribute_recall(answer, case.reference, ATTRIBUTES)
    if recall is not None:
        scores["attribute_recall"] = recall
    return Row(case, answer, None, REFUSAL if is_refusal(answer) else NONE, scores)


def section_scores(rows: Sequence[Row], blank: Sequence[Row]) -> dict[str, Any]:
    """All scores of one section. ``blank``: the same cases answered about a grey picture; empty = not asked.

    Questions without an answer (a broken picture) are left out and counted as ``errors``.
    """
    scored = [row for row in rows if row.status != ERROR]
    result: dict[str, Any] = {"n": len(scored), "errors": len(rows) - len(scored)}
    if not scored:
        return result
    ids = {row.case.id for row in scored}
    grey = [row for row in blank if row.case.id in ids and row.status != ERROR]
    if scored[0].case.names:
        return result | _closed_scores(scored, grey)
    return result | _text_scores(scored, grey)


def _closed_scores(rows: Sequence[Row], grey: Sequence[Row]) -> dict[str, Any]:
    first = rows[0].case
    labels = _names(rows)
    references, given = targets_of(rows)
    pictures = [row.case.picture for row in rows]
    counts = table.count_table(references, given, len(labels))
    status = Counter(row.status for row in rows)
    result: dict[str, Any] = {"kind": first.kind}
    for name, score in _INTERVALS.items():
        if name == "accuracy" or not first.options:  # the letters of options mean nothing
            result[name] = _interval(table.table_interval(score, references, given, len(labels), pictures))
    result["invalid"] = 1 - status[LABEL] / len(rows)
    result["refusal"] = status[REFUSAL] / len(rows)
    result["ambiguous"] = status[AMBIGUOUS] / len(rows)
    result["baselines"] = {
        "majority": table.majority_share(counts),
        "chance": sum(1 / len(row.case.names) for row in rows) / len(rows),
    } | ({"blank": sum(row.value for row in grey) / len(grey)} if grey else {})
    if first.options:
        return result
    result["weighted_f1"] = float(table.weighted_f1(counts))
    if first.labels is not None and first.labels.is_ordinal:
        score = table.mean_absolute_error
        result["mean_absolute_error"] = _interval(table.table_interval(score, references, given, len(labels), pictures))
        result["within_one"] = float(table.within_one(counts))
    per_class = zip(labels, table.precisions(counts), table.recalls(counts), table.f1_scores(counts), strict=True)
    result["per_class"] = {
        label: {"n": int(counts[number].sum()), "precision": _number(p), "recall": _number(r), "f1": _number(f)}
        for number, (label, p, r, f) in enumerate(per_class)
    }
    result["confusion"] = {"labels": [*labels, ""], "counts": counts.astype(int).tolist()}
    return result


def _text_scores(rows: Sequence[Row], grey: Sequence[Row]) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": "text"}
    for name in ("rouge_l", "attribute_recall"):
        chosen = [row for row in rows if name in row.scores]
        if chosen:
            found = mean_interval([row.scores[name] for row in chosen], [row.case.picture for row in chosen])
            result[name] = _interval(found) | {"n": len(chosen)}
            values = [row.scores[name] for row in grey if name in row.scores]
            result.setdefault("baselines", {})[f"blank_{name}"] = sum(values) / len(values) if values else None
    result["refusal"] = sum(row.status == REFUSAL for row in rows) / len(rows)
    return result


def slice_scores(rows: Sequence[Row], columns: Sequence[str], min_size: int) -> dict[str, Any]:
    """Column -> groups, their scores, and the gap between them, for one section."""
    scored = [row for row in rows if row.status != ERROR]
    result: dict[str, Any] = {}
    for column in columns:
        members = [str(row.case.meta.get(column, "")) for row in scored]
        if not any(members):
            continue
        found = compare_groups([row.value for row in scored], members, [row.case.picture for row in scored], min_size)
        result[column] = {
            "groups": {name: {"n": n, **_interval(interval)} for name, (n, interval) in found.groups.items()},
            "too_small": found.small,
            "without_value": members.count(""),
            "gap": None if found.gap is None else _interval(found.gap),
            "chance": found.chance,
        }
    return result


def targets_of(rows: Sequence[Row]) -> tuple[list[int], list[int | None]]:
    """Numbers of the references and of the given labels of closed cases."""
    return [row.case.target or 0 for row in rows], [row.label for row in rows]


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    if rows[0].case.options:
        return tuple(LETTERS[: max(len(row.case.options) for row in rows)])
    return rows[0].case.names


def _interval(found: Interval) -> dict[str, float | None]:
    return {"value": _number(found.value), "low": _number(found.low), "high": _number(found.high)}


def _number(value: float) -> float | None:
    """A number that JSON can hold; None for nan."""
    return round(float(value), 6) if value == value else None
