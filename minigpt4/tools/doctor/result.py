"""What was found, data set by data set: counts, a few examples of each, histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minigpt4.tools.doctor.checks import CHECKS, ERROR, SEVERITIES
from minigpt4.tools.doctor.examine import Finding

EXAMPLES = 24
"""Findings of one check that are kept with their place."""
_BARS = 24


@dataclass
class Problem:
    """All findings of one check in one split."""

    check: str
    count: int = 0
    examples: list[Finding] = field(default_factory=list)


@dataclass
class Result:
    """One split. size: its samples, of which ``looked_at`` were examined. wrong: samples with an error.

    folders: where annotations and pictures lie; places are shown without them.
    """

    title: str
    size: int = 0
    looked_at: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    histograms: dict[str, Counter[str | int]] = field(default_factory=dict)
    wrong: set[int] = field(default_factory=set)
    folders: dict[str, str] = field(default_factory=dict)

    def short(self, text: str) -> str:
        """``text`` without the folders, which stand once at the top."""
        for folder in sorted(self.folders.values(), key=len, reverse=True):
            text = text.replace(f"{folder}/", "")
        return text

    def add(self, findings: Iterable[Finding]) -> None:
        """Counts findings; the first ones of every check are kept."""
        for finding in findings:
            problem = self.problems.setdefault(finding.check, Problem(finding.check))
            problem.count += 1
            if len(problem.examples) < EXAMPLES:
                problem.examples.append(finding)
            if CHECKS[finding.check].severity == ERROR and finding.index >= 0:
                self.wrong.add(finding.index)

    def count(self, counts: Iterable[tuple[str, str | int]]) -> None:
        """Adds to histograms."""
        for name, value in counts:
            self.histograms.setdefault(name, Counter())[value] += 1

    @property
    def sorted_problems(self) -> list[Problem]:
        """Errors first, then warnings, then notes; in the order of CHECKS."""
        order = list(CHECKS)
        found = [self.problems[name] for name in order if name in self.problems]
        return sorted(found, key=lambda problem: SEVERITIES.index(CHECKS[problem.check].severity))

    def number(self, severity: str) -> int:
        """Findings of one severity."""
        return sum(item.count for item in self.problems.values() if CHECKS[item.check].severity == severity)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "title": self.title,
            "size": self.size,
            "looked_at": self.looked_at,
            "records_with_errors": len(self.wrong),
            "folders": self.folders,
            "problems": [
                {
                    "check": item.check,
                    "severity": CHECKS[item.check].severity,
                    "title": CHECKS[item.check].title,
                    "count": item.count,
                    "examples": [_example(finding) for finding in item.examples],
                }
                for item in self.sorted_problems
            ],
            "histograms": {name: dict(rows(counter)) for name, counter in sorted(self.histograms.items())},
        }


def _example(finding: Finding) -> dict[str, str]:
    values = {"where": finding.where, "id": finding.record_id, "image": finding.image, "detail": finding.detail}
    return {key: value for key, value in values.items() if value}


def rows(counter: Counter[str | int], most: int = _BARS) -> list[tuple[str, int]]:
    """Names and counts: ranges of numbers in their order, the ``most`` frequent words, the others together."""
    numbers = sorted(value for value in counter if isinstance(value, int))
    if numbers:
        return [(str(low) if low < 2 else f"{low} to {2 * low - 1}", counter[low]) for low in numbers]
    common = counter.most_common(most)
    rest = counter.total() - sum(count for _, count in common)
    others = [(f"{len(counter) - most} others", rest)] if rest else []
    return [(str(name), count) for name, count in common] + others
