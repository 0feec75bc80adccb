"""Scores of generated answers by name (registry kind 'metric'); what ``run.valid.metrics`` may list besides loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.metrics import classification
from minigpt4.metrics.accuracy import exact_accuracy, is_exact, plain

Score = Callable[[Sequence[str], Sequence[str]], float]


@dataclass(frozen=True)
class AnswerMetric:
    """``score``: answers and their references -> a number, higher is better.

    ``is_right``: whether one answer is right; None where an answer is more or less right.
    """

    description: str
    score: Score
    is_right: Callable[[str, str], bool] | None = None


def macro_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 over the labels that occur among the references (scikit-learn); any other answer is wrong."""
    try:
        from sklearn.metrics import f1_score
    except ImportError as error:
        raise ConfigError("metric macro_f1 needs a package that is not installed; run: pip install scikit-learn") from (
            error
        )
    truth = [plain(reference) for reference in references]
    labels = sorted(set(truth))
    given = [plain(answer) for answer in answers]
    return float(f1_score(truth, given, labels=labels, average="macro", zero_division=0.0))


def balanced_accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean recall over the labels that occur among the references; any other answer is wrong."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(map(plain, references)))}
    given = [numbers.get(plain(answer)) for answer in answers]
    table = classification.count_table([numbers[plain(reference)] for reference in references], given, len(numbers))
    return float(classification.balanced_accuracy(table))


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure for answers of a sentence or more."""
    return sum(rouge_l_each(answers, references)) / len(references)


def rouge_l_each(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F-measure of every answer (Lin 2004, torchmetrics), 0 to 1."""
    if not answers:
        return []
    try:
        from torchmetrics.functional.text import rouge_score
    except ImportError as error:
        raise ConfigError("ROUGE-L needs a package that is not installed; run: pip install torchmetrics") from error
    pairs = zip(answers, references, strict=True)
    return [float(rouge_score(a, r, rouge_keys="rougeL")["rougeL_fmeasure"]) for a, r in pairs]


METRICS = {
    "exact_accuracy": AnswerMetric(
        "Share of answers equal to the reference but for case and a full stop", exact_accuracy, is_exact
    ),
    "macro_f1": AnswerMetric("Mean F1 over the labels; rare ones count as much as frequent ones", macro_f1, is_exact),
    "balanced_accuracy": AnswerMetric(
        "Mean recall over the labels; a rare one counts as much", balanced_accuracy, is_exact
    ),
    "rouge_l": AnswerMetric("Overlap of word sequences with the reference, for longer answers", rouge_l),
}
for _name, _metric in METRICS.items():
    registry.register("metric", _name)(_metric)
