"""Attributes of people: CelebA, UTKFace, FairFace."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from minigpt4.common.errors import DataError, nearest
from minigpt4.common.registry import registry
from minigpt4.evaluation.faces.cases import Case, FaceSet, Source, existing, label_case, official
from minigpt4.evaluation.faces.label_sets import AGE, AGE_BINS, FAIRFACE_RACE, GENDER, UTKFACE_RACE, presence_set
from minigpt4.metrics.labels import LabelSet

QUESTIONS = {
    "age": "How old is the person?",
    "gender": "What is the gender of the person?",
    "race": "What is the race of the person?",
}
CELEBA_NAMES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair "
    "Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
    "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young"
).split()
"""The attributes in the order of the file."""
CELEBA_ASKED = ("Bald", "Bangs", "Black_Hair", "Blond_Hair", "Eyeglasses", "Mouth_Slightly_Open", "Mustache", "Smiling")
"""What is asked unless sections are named: visible, and no judgement of a person."""
_CELEBA_WORDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "5_o_Clock_Shadow": ("have a 5 o'clock shadow", ("stubble",)),
    "Attractive": ("look attractive", ("attractive",)),
    "Bald": ("have a bald head", ("bald",)),
    "Blurry": ("appear in a blurry picture", ("blurry", "blurred")),
    "Chubby": ("look chubby", ("chubby",)),
    "Eyeglasses": ("wear glasses", ("glasses", "eyeglasses")),
    "Male": ("look male", ("male", "man")),
    "Mouth_Slightly_Open": ("have the mouth slightly open", ("open",)),
    "No_Beard": ("have a face without a beard", ()),
    "Smiling": ("smile", ("smiling", "smile", "smiles")),
    "Young": ("look young", ("young",)),
}
"""Attributes that 'Does the person have ...?' does not fit, and words that mean them."""
_ONE_OF_A_KIND = (
    "Big_Nose Double_Chin Goatee Mustache Oval_Face Pointy_Nose Receding_Hairline Wearing_Hat Wearing_Necklace "
    "Wearing_Necktie"
).split()
_UTK_NAME = re.compile(r"^(\d{1,3})_([01])_([0-4])_(\d+)\.jpg(?:\.chip)?(?:\.jpg)?$")
_UTK_GENDER = ("Male", "Female")
_FAIRFACE_COLUMNS = ("file", "age", "gender", "race")


@registry.register("face_set", "celeba")
def celeba(source: Source) -> FaceSet:
    """CelebA attributes, Yes or No: list_attr_celeba.txt, list_eval_partition.txt, img_align_celeba."""
    wanted = source.splits({"train": "0", "val": "1", "test": "2"}, "test")
    table = source.file("list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
    partition = source.file("list_eval_partition.txt", "Eval/list_eval_partition.txt")
    folder = source.folder("img_align_celeba", "Img/img_align_celeba")
    chosen = source.chosen(CELEBA_NAMES, CELEBA_ASKED)
    asked = {name: (_celeba_question(name), _celeba_labels(name), CELEBA_NAMES.index(name)) for name in chosen}
    split = dict(line.split() for line in partition.read_text(encoding="utf-8").splitlines() if line.strip())
    lines = table.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2 or lines[1].split() != CELEBA_NAMES:
        raise DataError(f"{table}, line 2: expected the 40 attributes in their official order, {CELEBA_NAMES[0]} first")
    cases: list[Case] = []
    for number, line in enumerate(lines[2:], start=3):
        name, *values = line.split()
        if split.get(name) != wanted:
            continue
        if len(values) != len(CELEBA_NAMES) or not set(values) <= {"1", "-1"}:
            raise DataError(f"{table}, line {number}: expected a picture and 40 values, 1 or -1")
        image = existing(folder / name, f"{table}, line {number}")
        meta = {key: "yes" if values[CELEBA_NAMES.index(key)] == "1" else "no" for key in ("Male", "Young")}
        for attribute, (question, labels, place) in asked.items():
            label = "Yes" if values[place] == "1" else "No"
            cases.append(label_case(f"{name}/{attribute}", image, question, labels, label, meta, attribute))
    return _complete(FaceSet("celeba", tuple(cases), slices=("Male", "Young")), table)


def _celeba_question(name: str) -> str:
    if name in _CELEBA_WORDS:
        return f"Does the person {_CELEBA_WORDS[name][0]}?"
    verb, thing = ("wear", name.removeprefix("Wearing_")) if name.startswith("Wearing_") else ("have", name)
    article = ("an " if name[0] in "AO" else "a ") if name in _ONE_OF_A_KIND else ""
    return f"Does the person {verb} {article}{thing.replace('_', ' ').lower()}?"


def _celeba_labels(name: str) -> LabelSet:
    _, words = _CELEBA_WORDS.get(name, ("", (name.removeprefix("Wearing_").replace("_", " "),)))
    return presence_set(name, words)


@registry.register("face_set", "utkface")
def utkface(source: Source) -> FaceSet:
    """UTKFace: pictures named AGE_GENDER_RACE_DATE.jpg; asks for age group, gender and race."""
    chosen = source.chosen(list(QUESTIONS), list(QUESTIONS))
    folder = next((at for at in (source.root / "UTKFace", source.root) if at.is_dir()), source.root)
    names = sorted(path.name for path in folder.iterdir() if ".jpg" in path.name) if folder.is_dir() else []
    cases: list[Case] = []
    wrong: list[str] = []
    for name in names:
        match = _UTK_NAME.match(name)
        if match is None or int(match[1]) > AGE_BINS[-1][1]:
            wrong.append(name)
            continue
        age, gender, race = (int(match[group]) for group in (1, 2, 3))
        place = next(number for number, (_, last) in enumerate(AGE_BINS) if age <= last)
        values = {"age": AGE.labels[place], "gender": _UTK_GENDER[gender], "race": UTKFACE_RACE.labels[race]}
        cases += _person(name, folder / name, values, {"age": AGE, "gender": GENDER, "race": UTKFACE_RACE}, chosen)
    if not cases:
        told = f"the first of {len(names)} pictures is '{names[0]}'" if names else "it holds no .jpg files"
        raise DataError(f"'{folder}': no picture is named AGE_GENDER_RACE_DATE.jpg; {told}")
    notes = (f"file names without age, gender and race, left out: {len(wrong)} ({', '.join(wrong[:5])})",)
    return FaceSet("utkface", tuple(cases), slices=tuple(QUESTIONS), notes=notes if wrong else ())


@registry.register("face_set", "fairface")
def fairface(source: Source) -> FaceSet:
    """FairFace: fairface_label_val.csv with file, age, gender and race, pictures beside it."""
    split = source.splits({"val": "val", "train": "train"}, "val")
    path = source.annotations or source.file(f"fairface_label_{split}.csv")
    chosen = source.chosen(list(QUESTIONS), list(QUESTIONS))
    sets = {"age": AGE, "gender": GENDER, "race": FAIRFACE_RACE}
    cases: list[Case] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for column in _FAIRFACE_COLUMNS:
            if column not in columns:
                raise DataError(f"{path}: no column '{column}'{nearest(column, columns)}; found: {', '.join(columns)}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            values = {name: _written(labels, row[name], where, name) for name, labels in sets.items()}
            image = existing(source.root / row["file"], where)
            cases += _person(row["file"], image, values, sets, chosen)
    return _complete(FaceSet("fairface", tuple(cases), slices=tuple(QUESTIONS)), path)


def _written(labels: LabelSet, text: str, where: str, column: str) -> str:
    """The label that a file means. Raises DataError for another one."""
    number = labels.index(text)
    if number is None:
        raise DataError(f"{where}: {column} '{text}', expected one of: {', '.join(labels.labels)}")
    return official(labels, number, where)


def _person(
    identity: str, image: Path, values: Mapping[str, str], sets: Mapping[str, LabelSet], chosen: Sequence[str]
) -> list[Case]:
    """One case per chosen property of a person."""
    return [
        label_case(f"{identity}/{name}", image, QUESTIONS[name], sets[name], values[name], values, name)
        for name in chosen
    ]


def _complete(found: FaceSet, path: Path) -> FaceSet:
    if not found.cases:
        raise DataError(f"{path}: holds no pictures of this split")
    return found
