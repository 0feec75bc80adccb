"""What only shows when records are held against each other: duplicates, contradictions, leaks into validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from minigpt4.tools.doctor.examine import Examiner, Facts, Finding
from minigpt4.tools.doctor.texts import record_texts

NEAR = 4
"""Bits of 64 in which the hashes of nearly the same picture may differ."""
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
"""Start and width of NEAR + 1 pieces of a hash: two hashes that differ in NEAR bits share at least one piece whole."""


@dataclass
class _Twins:
    """First index of every record and of every question of one split."""

    records: dict[bytes, int] = field(default_factory=dict)
    asked: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)


@dataclass
class Comparison:
    """Held over all splits; ``add`` every record once, in order, then ``leaks``.

    Hashes alone are kept, about 200 bytes per record.
    """

    examiners: list[Examiner]
    _twins: dict[int, _Twins] = field(default_factory=dict)
    _pictures: list[tuple[int, int, bytes, int | None]] = field(default_factory=list)

    def add(self, number: int, facts: Facts) -> list[Finding]:
        """Takes in a record of split ``number``; returns what it repeats or contradicts in its split."""
        twins = self._twins.setdefault(number, _Twins())
        found = []
        if facts.identity:
            first = twins.records.setdefault(facts.identity, facts.index)
            if first != facts.index:
                found.append(self._finding(number, facts.index, "record-duplicate", f"as {self._where(number, first)}"))
        if facts.asked is not None:
            question, answer = facts.asked
            other, first = twins.asked.setdefault(question, (answer, facts.index))
            if other != answer:
                place = self._where(number, first)
                found.append(self._finding(number, facts.index, "answers-conflict", f"against {place}"))
        self._pictures += [(number, facts.index, content, pattern) for content, pattern in facts.pictures]
        return found

    def leaks(self) -> Iterator[tuple[int, Finding]]:
        """Training records whose picture, or whose text, is in a validation split too: (split, finding)."""
        held_out = {number for number, item in enumerate(self.examiners) if item.split.split != "train"}
        contents = {content: (number, index) for number, index, content, _ in self._pictures if number in held_out}
        contents.pop(b"", None)
        patterns = _Patterns((pattern, (number, i)) for number, i, _, pattern in self._pictures if number in held_out)
        reported = set()
        for number, index, content, pattern in self._pictures:
            if number in held_out or (number, index) in reported:
                continue
            same = contents.get(content)
            near = patterns.find(pattern) if same is None and pattern is not None else None
            if same is not None:
                reported.add((number, index))
                yield number, self._finding(number, index, "leak-same", f"also {self._place(same)}")
            elif near is not None:
                reported.add((number, index))
                detail = f"{near[0]} of 64 bits from {self._place(near[1])}"
                yield number, self._finding(number, index, "leak-similar", detail)
        yield from self._repeated_records(held_out, reported)

    def _repeated_records(self, held_out: set[int], reported: set[tuple[int, int]]) -> Iterator[tuple[int, Finding]]:
        known = {key: (number, i) for number in held_out for key, i in self._records(number).items()}
        for number in range(len(self.examiners)):
            for key, index in self._records(number).items() if number not in held_out else ():
                if key in known and (number, index) not in reported:
                    detail = f"also {self._place(known[key])}"
                    yield number, self._finding(number, index, "leak-record", detail)

    def _records(self, number: int) -> dict[bytes, int]:
        return self._twins[number].records if number in self._twins else {}

    def _finding(self, number: int, index: int, check: str, detail: str) -> Finding:
        dataset = self.examiners[number].split.dataset
        record = dataset.record(index)
        image = str((record.get("images") or [""])[0])
        files = dataset.pictures(index) if check.startswith("leak-s") else []
        image = next((str(file) for file in files if not isinstance(file, bytes)), image)
        name = str(record.get("id", ""))
        text = next(reversed(list(record_texts(record))), "")
        return Finding(check, index, detail, dataset.where(index), name, image, text[:400])

    def _where(self, number: int, index: int) -> str:
        return self.examiners[number].split.dataset.where(index)

    def _place(self, place: tuple[int, int]) -> str:
        return f"{self.examiners[place[0]].split.title}, {self._where(*place)}"


class _Patterns:
    """Hashes of pictures, found again when at most NEAR bits differ."""

    def __init__(self, items: Iterable[tuple[int | None, tuple[int, int]]]) -> None:
        self._bands: list[dict[int, list[tuple[int, tuple[int, int]]]]] = [{} for _ in _BANDS]
        first: dict[int, tuple[int, int]] = {}  # many pictures of one pattern are compared as one
        for pattern, place in items:
            if pattern is not None:
                first.setdefault(pattern, place)
        for pattern, place in first.items():
            for band, key in zip(self._bands, _keys(pattern), strict=True):
                band.setdefault(key, []).append((pattern, place))

    def find(self, pattern: int) -> tuple[int, tuple[int, int]] | None:
        """Number of different bits and place of the nearest one, None when none is near."""
        candidates = (item for band, key in zip(self._bands, _keys(pattern), strict=True) for item in band.get(key, ()))
        near = [(bits, place) for other, place in candidates if (bits := (other ^ pattern).bit_count()) <= NEAR]
        return min(near, default=None)


def _keys(pattern: int) -> list[int]:
    return [pattern >> start & (1 << width) - 1 for start, width in _BANDS]
