"""One noun for all face evaluations: pictures, a question, and what a right answer is."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minigpt4.common.errors import ConfigError, DataError, nearest
from minigpt4.metrics.labels import LabelSet

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Case:
    """One question with its reference.

    section    what it is scored with: one table row.
    labels     the closed set its answer is from; None for multiple choice and for free text.
    options    texts of a multiple-choice question, in its own order; answered by letter.
    reference  the right label, option or text. ``target`` is its number among ``names``; None for free text.
    meta       properties of the picture or person, for comparing groups.
    """

    id: str
    images: tuple[str, ...]
    question: str
    reference: str
    section: str
    labels: LabelSet | None = None
    options: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What can be answered; empty for free text."""
        return self.options or (self.labels.labels if self.labels is not None else ())

    @property
    def kind(self) -> str:
        """What sort of answer is asked for: label, choice or text."""
        return "choice" if self.options else "text" if self.labels is None else "label"

    @property
    def target(self) -> int | None:
        """Number of the reference among ``names``."""
        return self.names.index(self.reference) if self.names else None

    @property
    def picture(self) -> str:
        """What cases about the same picture share."""
        return self.images[0] if self.images else self.id

    def prompt(self, order: Sequence[int] | None) -> str:
        """The question; with ``order`` also what can be answered, in that order."""
        if order is None:
            return self.question
        names = [self.names[number] for number in order]
        if self.options:
            listed = " ".join(f"{letter}. {name}" for letter, name in zip(LETTERS[: len(names)], names, strict=True))
            return f"{self.question} {listed} Answer with the letter of the right option."
        return f"{self.question} Choose one of these: {', '.join(names)}."

    def answers(self, order: Sequence[int] | None) -> list[str]:
        """What the model would have to say for each of ``names``, given the order of the prompt."""
        if not self.options:
            return list(self.names)
        places = order if order is not None else range(len(self.options))
        return [LETTERS[list(places).index(number)] for number in range(len(self.options))]


@dataclass(frozen=True)
class FaceSet:
    """The cases of one data set.

    shows_options  whether prompts name the possible answers unless told otherwise; multiple choice always does.
    slices         columns of ``meta`` to compare groups by unless told otherwise.
    notes          what was left out, and why.
    """

    name: str
    cases: tuple[Case, ...]
    shows_options: bool = True
    slices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sections(self) -> list[str]:
        """Sections in the order of the cases."""
        return list(dict.fromkeys(case.section for case in self.cases))

    def limited(self, count: int, seed: int) -> FaceSet:
        """A random sample of ``count`` pictures with all their questions, in the old order; 0 = everything."""
        pictures = list(dict.fromkeys(case.picture for case in self.cases))
        if not 0 < count < len(pictures):
            return self
        chosen = set(random.Random(seed).sample(pictures, count))
        note = f"{count} of {len(pictures)} pictures, drawn with seed {seed}"
        kept = tuple(case for case in self.cases if case.picture in chosen)
        return replace(self, cases=kept, notes=(*self.notes, note))

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ConfigError for a column that no case has."""
        known = list(dict.fromkeys(name for case in self.cases for name in case.meta))
        for name in columns:
            if name not in known:
                told = ", ".join(known) or "none"
                raise ConfigError(f"--by {name}: '{self.name}' has no such column{nearest(name, known)}; known: {told}")


@dataclass(frozen=True)
class Source:
    """Where and how a data set is read.

    split        '' = the one that papers report on.
    sections     tasks or sections to ask about; empty = the data set's own choice.
    cache        folder for pictures that the data set keeps inside a table.
    annotations  the annotation file, where it is not at the usual place below ``root``.
    fields       own data: what is needed -> name of the column that has it.
    """

    root: Path
    split: str = ""
    sections: tuple[str, ...] = ()
    cache: Path = Path()
    annotations: Path | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    label_set: str = ""

    def file(self, *names: str) -> Path:
        """The first of ``names`` that is there below ``root``. Raises DataError that lists what is."""
        for name in names:
            if (self.root / name).is_file():
                return self.root / name
        found = sorted(path.name for path in self.root.iterdir())[:12] if self.root.is_dir() else []
        there = f"it holds: {', '.join(found)}" if found else "there is no such folder, or it is empty"
        told = " or ".join(f"'{name}'" for name in names)
        raise DataError(f"--data-root '{self.root}': {told} not found; {there}")

    def folder(self, *names: str) -> Path:
        """The first of the folders ``names`` that is there below ``root``. Raises DataError."""
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        told = " or ".join(f"'{name}'" for name in names)
        raise DataError(f"--data-root '{self.root}': no folder {told}")

    def chosen(self, known: Sequence[str], default: Sequence[str]) -> list[str]:
        """Sections to read. Raises ConfigError for one that the data set does not have."""
        for name in self.sections:
            if name not in known:
                raise ConfigError(f"--sections: no section '{name}'{nearest(name, known)}; known: {', '.join(known)}")
        return list(self.sections or default)

    def splits(self, known: Mapping[str, str], default: str) -> str:
        """The data set's own name of the split. Raises ConfigError for one that it does not have."""
        name = self.split or default
        if name not in known:
            raise ConfigError(f"--split: no split '{name}'; known: {', '.join(known)}")
        return known[name]


Reader = Callable[[Source], FaceSet]
"""Reads a data set (registry kind 'face_set'). Raises DataError that names the file and what is wrong with it."""


def label_case(
    identity: str, image: Path, question: str, labels: LabelSet, label: str, meta: Mapping[str, str], section: str = ""
) -> Case:
    """A question about one picture with a label of a closed set as its answer."""
    return Case(identity, (str(image),), question, label, section or labels.name, labels, (), dict(meta))


def existing(path: Path, where: str) -> Path:
    """``path``. Raises DataError when the picture that ``where`` names is not there."""
    if not path.is_file():
        raise DataError(f"{where}: picture '{path}' not found")
    return path


def official(labels: LabelSet, number: int, where: str) -> str:
    """The label with this number in the official order. Raises DataError for a number without a label."""
    if not 0 <= number < len(labels.labels):
        raise DataError(f"{where}: label {number}, expected 0 to {len(labels.labels) - 1} ({', '.join(labels.labels)})")
    return labels.labels[number]
