"""Which label of a closed set a free answer gives, if it gives exactly one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from minigpt4.metrics.accuracy import plain

LABEL, AMBIGUOUS, NONE, REFUSAL = "label", "ambiguous", "none", "refusal"
"""What an answer can be: one label; several; none; none, because the model declines to say."""

_NEGATED_WORDS = 5
"""A negation reaches this many words ahead: 'no visible sign of any anger'."""
_NEGATION = re.compile(
    r"\b(?:not(?! (?:only|just|merely)\b)|no(?! doubt\b)|cannot|never|neither|nor|none|without|lack|lacks|lacking|"
    r"hardly|rather than|instead of|absence of|free of|free from)(?![\w'])|n't\b"
)
_CLAUSE_END = re.compile(r"[.;:!?,()\n]|\b(?:but|however|although|though|while|whereas|yet|because|since|so)\b")
_DECLINED = (
    r"sorry|as an ai\b|language model|"
    r"\b(?:can not|cannot|can't|could not|couldn't|unable to|not able to|not possible to|impossible to|"
    r"won't|will not|do not wish to|refuse to|not appropriate to|inappropriate to)"
    r"(?: \w+){0,2}? ?(?:determine|tell|say|see|identify|answer|assist|help|provide|infer|assess|comment|describe|"
    r"judge|estimate|guess|recognize|recognise|make|classify|be determined|discern)|"
    r"\bno (?:race|gender|way to tell)\b|don't know|do not know|not shown"
)
_REFUSAL = re.compile(_DECLINED)
_NUMBER = re.compile(r"(?<![\w.])(\d{1,3})(?:\s*(?:-|to|and|or)\s*(\d{1,3}))?(s\b)?(?![\w.]*\d)")


@dataclass(frozen=True)
class Extracted:
    """The label of an answer by its number, or None and why: ``status`` is LABEL, AMBIGUOUS, NONE or REFUSAL."""

    label: int | None
    status: str


@dataclass(frozen=True)
class LabelSet:
    """Labels in their official order, with the words that mean them.

    synonyms    label -> other words; matched as whole words, the longest first.
    whole       label -> texts that mean it only when they are the whole answer ('I' for 'Type I').
    opposites   label -> the label that its negation means ('no glasses' when Yes is 'glasses').
    leads       an answer that begins with a label is that label, whatever follows ('No, but yes ...').
    is_ordinal  neighbours are nearer than others, so that a distance means something.
    bins        inclusive ranges of whole numbers, one per label: answers may give a number ('about 25').
    """

    name: str
    labels: tuple[str, ...]
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    whole: Mapping[str, Sequence[str]] = field(default_factory=dict)
    opposites: Mapping[str, str] = field(default_factory=dict)
    leads: bool = False
    is_ordinal: bool = False
    bins: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("synonyms", self.synonyms), ("whole", self.whole), ("opposites", self.opposites)):
            unknown = [label for label in known if label not in self.labels]
            if unknown:
                raise ValueError(f"label set '{self.name}': {name} of '{unknown[0]}', which is no label")
        taken: dict[str, str] = {}
        for label in self.labels:
            for term in self._terms_of(label):
                if taken.setdefault(term, label) != label:
                    raise ValueError(f"label set '{self.name}': '{term}' means {taken[term]} and {label}")

    def index(self, label: str) -> int | None:
        """Number of a label as data sets write it, with case and synonyms left aside; None for no label."""
        return self._whole_answers.get(_plain_label(label))

    def extract(self, answer: str) -> Extracted:
        """The one label that an answer gives. Negated mentions do not count."""
        number = self.index(answer)
        if number is not None:
            return Extracted(number, LABEL)
        text = _normal(answer)
        if self.leads and (opening := re.match(r"\W*(\w+)", text)) and opening[1] in map(_normal, self.labels):
            return Extracted(self._numbers[opening[1]], LABEL)
        found = self.mentions(answer)
        if not found and self.bins:
            found = set(self._binned(text))
        if len(found) == 1:
            return Extracted(found.pop(), LABEL)
        if _REFUSAL.search(text):
            return Extracted(None, REFUSAL)
        return Extracted(None, AMBIGUOUS if found else NONE)

    def mentions(self, answer: str) -> set[int]:
        """Numbers of all labels that an answer speaks of and does not deny."""
        text = _normal(answer)
        found = set()
        for match in self._pattern.finditer(text):
            label = self.labels[self._numbers[_spaced(match[0])]]
            if is_negated(text, match.start()):
                if label not in self.opposites:
                    continue
                label = self.opposites[label]
            found.add(self.labels.index(label))
        return found

    def _terms_of(self, label: str) -> list[str]:
        return [_spaced(_normal(term)) for term in (label, *self.synonyms.get(label, ()))]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {term: number for number, label in enumerate(self.labels) for term in self._terms_of(label)}

    @cached_property
    def _whole_answers(self) -> dict[str, int]:
        only = {_plain_label(text): self.labels.index(label) for label, texts in self.whole.items() for text in texts}
        return {**only, **{_plain_label(term): number for term, number in self._numbers.items()}}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        terms = sorted(self._numbers, key=lambda term: (-len(term), term))
        spelled = [re.escape(term).replace(r"\ ", r"[\s_-]+") for term in terms]
        return re.compile(rf"(?<![\w-])(?:{'|'.join(spelled)})(?![\w-])")

    def _binned(self, text: str) -> Iterator[int]:
        for match in _NUMBER.finditer(text):
            low = int(match[1])
            value = low + 5 if match[3] else (low + int(match[2])) // 2 if match[2] else low
            for number, (first, last) in enumerate(self.bins):
                if first <= value <= last:
                    yield number


def is_negated(text: str, place: int) -> bool:
    """Whether a negation in the clause before ``place`` of a lower-case text reaches it."""
    before = text[:place]
    clause = before[max((match.end() for match in _CLAUSE_END.finditer(before)), default=0) :]
    near = re.split(r"\s+", clause.strip())[-_NEGATED_WORDS:]
    return bool(_NEGATION.search(" ".join(near)))


def is_refusal(answer: str) -> bool:
    """Whether an answer declines to say."""
    return bool(_REFUSAL.search(_normal(answer)))


def attribute_recall(answer: str, reference: str, attributes: Sequence[LabelSet]) -> float | None:
    """Share of the attributes that a reference speaks of which the answer names too; None where it names none."""
    wanted = {(item.name, number) for item in attributes for number in item.mentions(reference)}
    if not wanted:
        return None
    named = {(item.name, number) for item in attributes for number in item.mentions(answer)}
    return len(wanted & named) / len(wanted)


def chosen_option(answer: str, options: Sequence[str]) -> Extracted:
    """The option of a multiple-choice question that an answer gives: by its letter, else by its text."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    text = answer.strip()
    single = re.match(rf"\(?([{letters}{letters.lower()}])(?:[).:]|\s*$)", text)
    told = re.findall(rf"(?:answer|option|choice)(?: is| would be|:)?:?\s*\(?([{letters}])\b", text)
    found = {letters.index(letter.upper()) for letter in ([single[1]] if single else told)}
    if not found:
        found = LabelSet("options", tuple(_distinct(options))).mentions(text) if _distinct(options) else set()
    if len(found) == 1:
        return Extracted(found.pop(), LABEL)
    return Extracted(None, REFUSAL if is_refusal(text) else AMBIGUOUS if found else NONE)


def _distinct(options: Sequence[str]) -> list[str]:
    """The options, when no two read alike; otherwise their texts cannot tell them apart."""
    plains = {_spaced(_normal(option)) for option in options}
    return list(options) if len(plains) == len(options) and "" not in plains else []


def _plain_label(text: str) -> str:
    return _spaced(plain(_normal(text)))


def _normal(text: str) -> str:
    """Lower case, plain apostrophes and dashes."""
    return text.lower().replace("\u2019", "'").replace("\u2013", "-").replace("\u2014", ", ")


def _spaced(text: str) -> str:
    """Words with single spaces between them; underscores and dashes are spaces."""
    return re.sub(r"[\s_-]+", " ", text).strip()
