"""Exact-answer accuracy with the baselines that tell whether it means anything."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def is_exact(answer: str, reference: str) -> bool:
    """Equal but for case, surrounding space and a final full stop."""
    return plain(answer) == plain(reference)


def exact_accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of exact answers. Raises ValueError for unequal or empty lists."""
    if not references or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    return sum(map(is_exact, answers, references)) / len(references)


def majority_accuracy(references: Sequence[str]) -> float:
    """What always giving the most frequent reference would score."""
    counts = Counter(plain(reference) for reference in references)
    return max(counts.values()) / len(references)


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), usable for few samples and shares near 0 or 1."""
    if total < 1:
        raise ValueError("an interval needs at least one sample")
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def plain(text: str) -> str:
    """How answers are compared: without case, surrounding space and a final full stop."""
    return text.strip().rstrip(".").strip().casefold()


def word_overlap(answer: str, reference: str) -> float:
    """F1 of the words that answer and reference share, without case and punctuation (SQuAD, Rajpurkar 2016); 0 to 1."""
    given, wanted = (Counter(_WORD.findall(text.casefold())) for text in (answer, reference))
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (given & wanted).total() / (given.total() + wanted.total())
