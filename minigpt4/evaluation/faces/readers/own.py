"""Any annotation file with pictures and answers, and FaceGPT4Vision by its sections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from minigpt4.common.errors import ConfigError, DataError, nearest
from minigpt4.common.registry import registry
from minigpt4.datasets.annotations import read_annotations
from minigpt4.datasets.sources import read_sources
from minigpt4.datasets.talks import conversation
from minigpt4.evaluation.faces.cases import Case, FaceSet, Source
from minigpt4.evaluation.faces.label_sets import (
    EMOTION8,
    FAIRFACE_RACE,
    FITZPATRICK,
    GENDER,
    HUMAN,
    INTENSITY,
    YES_NO,
    labels_of,
    named_label_set,
)
from minigpt4.metrics.labels import REFUSAL, LabelSet
from minigpt4.tasks.answering import shown_question

FIELDS = {"image": "image", "label": "label", "question": "question", "section": "section", "id": "id"}
"""What own data is made of and the columns it is looked for in; --fields names others."""
_SECTION_LABELS: Mapping[str, tuple[LabelSet, ...]] = {
    "Human or not": (HUMAN,),
    "Gender": (GENDER,),
    "Race": (FAIRFACE_RACE,),
    "Fitzpatrick": (FITZPATRICK,),
    "Intensity of the emotion": (INTENSITY, YES_NO),
    "Facial Expression due to contextual cues": (EMOTION8,),
}
"""Sections of FaceGPT4Vision whose answers may be labels."""
_CHOSEN_SECTIONS = (
    "Facial Characteristics Long",
    "Interpretative Generalization",
    "Factual Generalization",
    "Facial Expression due to contextual cues",
    "Feature by Feature Description",
    "Human or not",
)
_USABLE = 0.8
"""Share of a section's references, refusals aside, that must give a label; otherwise it is scored as text."""
_BY_SECTION = "gpt4VisionCalls_Cleaned_BySection.json"


@dataclass(frozen=True)
class _Found:
    """One record before it is known whether its section has labels."""

    case: Case
    where: str


@registry.register("face_set", "own")
def own(source: Source) -> FaceSet:
    """Any JSON, JSON lines, CSV or Parquet file, or folder of class folders: image, label, more columns."""
    unknown = [name for name in source.fields if name not in FIELDS]
    if unknown:
        raise ConfigError(f"--fields {unknown[0]}=...: may name {', '.join(FIELDS)}{nearest(unknown[0], FIELDS)}")
    columns = {**FIELDS, **source.fields}
    records = read_sources([source.annotations or source.root])
    found = [_own_record(dict(records[i]), records.where(i), i, columns, source) for i in range(len(records))]
    sections = source.chosen(list(dict.fromkeys(item.case.section for item in found)), ())
    found = [item for item in found if not sections or item.case.section in sections]
    cases: dict[str, Case] = {}
    for name in dict.fromkeys(item.case.section for item in found):
        for case in _with_labels([item for item in found if item.case.section == name], source.label_set):
            cases[case.id] = case
    ordered = tuple(cases[item.case.id] for item in found)
    file = source.annotations or source.root
    return FaceSet(f"own: {file.name}", ordered, shows_options=False)


def _own_record(
    record: Mapping[str, Any], where: str, index: int, columns: Mapping[str, str], source: Source
) -> _Found:
    for name in ("image", "label"):
        if record.get(columns[name]) in (None, ""):
            key = columns[name]
            known = ", ".join(record)
            raise DataError(
                f"{where}: column '{key}' is missing or empty{nearest(key, record)}; found: {known}; name another: "
                f"--fields {name}=COLUMN"
            )
    question = source.question or str(record.get(columns["question"]) or "")
    if not question.strip():
        raise DataError(f"{where}: has no column '{columns['question']}'; ask the same of all: --question TEXT")
    given = record[columns["image"]]
    names = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: column '{columns['image']}' holds {given!r}, expected a file name or a list of them")
    section = str(record.get(columns["section"]) or "all")
    number = str(record.get(columns["id"]) or index)
    used = set(columns.values())
    meta = {
        key: str(value) for key, value in record.items() if key not in used and isinstance(value, (str, int, float))
    }
    images = tuple(str(source.root / name) for name in names)
    return _Found(Case(number, images, question, str(record[columns["label"]]).strip(), section, meta=meta), where)


def _with_labels(found: Sequence[_Found], label_set: str) -> list[Case]:
    """The cases of one section; with labels where their references are labels."""
    section = found[0].case.section
    if label_set:
        labels: LabelSet | None = named_label_set(label_set)
    else:
        labels = labels_of([item.case.reference for item in found], section)
    if labels is None:
        return [item.case for item in found]
    cases = []
    for item in found:
        number = labels.index(item.case.reference)
        if number is None:
            known = ", ".join(labels.labels)
            raise DataError(f"{item.where}: '{item.case.reference}' is no label of '{label_set}': {known}")
        cases.append(replace(item.case, labels=labels, reference=labels.labels[number]))
    return cases


@registry.register("face_set", "facegpt4vision")
def facegpt4vision(source: Source) -> FaceSet:
    """FaceGPT4Vision by section: labels where the references give some, else free text."""
    path = source.annotations or source.file(
        f"GPT4VisionData/Annotations/{_BY_SECTION}", f"Annotations/{_BY_SECTION}", _BY_SECTION, "by_section.json"
    )
    image_root = source.root
    if source.annotations is None and path.name == _BY_SECTION and path.parent.name == "Annotations":
        image_root = path.parent.parent / "Images"
    known = [name.strip() for name in _section_names(path)]
    chosen = source.chosen(known, [name for name in _CHOSEN_SECTIONS if name in known])
    records = read_annotations([path], chosen)
    found: dict[str, list[_Found]] = {name: [] for name in chosen}
    for index in range(len(records)):
        record, section = records[index], records.section(index)
        try:
            turn = conversation(record, (), Random(0))[0]
        except DataError as error:
            raise DataError(f"{records.where(index)}: {error}") from error
        if not isinstance(record.get("image"), str):
            raise DataError(f"{records.where(index)}: field 'image' is missing")
        identity = f"{section}/{len(found[section])}"
        images = (str(image_root / record["image"]),)
        case = Case(identity, images, shown_question(turn.prompt), turn.answer.strip(), section)
        found[section].append(_Found(case, records.where(index)))
    cases: list[Case] = []
    notes: list[str] = []
    for name, items in found.items():
        if items:
            kept, told = _section_cases(name, [item.case for item in items])
            cases += kept
            notes += told
    return FaceSet("facegpt4vision", tuple(cases), shows_options=False, notes=tuple(notes))


def _section_names(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f'{path}: expected {{"section": [records]}}')
    return list(content)


def _section_cases(name: str, cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """Cases with labels, when most references give one; those that give none are left out and told of.

    GPT-4V declined to answer some questions: such references are neither for nor against a section having labels.
    """
    for labels in _SECTION_LABELS.get(name, ()):
        found = [labels.extract(case.reference) for case in cases]
        declined = sum(item.status == REFUSAL for item in found)
        usable = [(case, item.label) for case, item in zip(cases, found, strict=True) if item.label is not None]
        if usable and len(usable) >= _USABLE * (len(cases) - declined):
            left = len(cases) - len(usable)
            told = f"{name}: references without a single label of '{labels.name}', left out: {left}"
            notes = [f"{told}, of which declined to answer: {declined}"] if left else []
            return [replace(case, labels=labels, reference=labels.labels[number]) for case, number in usable], notes
    return list(cases), []
