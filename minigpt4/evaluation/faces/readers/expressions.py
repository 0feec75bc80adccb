"""Facial expressions: AffectNet, RAF-DB, FER2013, FERPlus, in the layouts their owners hand out."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4.common.errors import DataError, nearest
from minigpt4.common.registry import registry
from minigpt4.evaluation.faces.cases import Case, FaceSet, Source, existing, label_case, official
from minigpt4.evaluation.faces.label_sets import AFFECTNET7, AFFECTNET8, FER2013, FERPLUS, RAF_DB
from minigpt4.metrics.labels import LabelSet

QUESTION = "What is the facial expression of the person?"
_AFFECTNET_OTHERS = {8: "None", 9: "Uncertain", 10: "No-Face"}
_FER_SPLITS = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
_FERPLUS_FOLDERS = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}
_FERPLUS_COLUMNS = (*FERPLUS.labels, "unknown", "NF")
_SIDE = 48


@registry.register("face_set", "affectnet8")
def affectnet8(source: Source) -> FaceSet:
    """AffectNet with contempt: val_set/images and val_set/annotations/NUMBER_exp.npy."""
    return _affectnet(source, "affectnet8", AFFECTNET8)


@registry.register("face_set", "affectnet7")
def affectnet7(source: Source) -> FaceSet:
    """AffectNet without contempt: val_set/images and val_set/annotations/NUMBER_exp.npy."""
    return _affectnet(source, "affectnet7", AFFECTNET7)


def _affectnet(source: Source, name: str, labels: LabelSet) -> FaceSet:
    folder = source.folder(source.splits({"val": "val_set", "train": "train_set"}, "val"))
    files = sorted((folder / "annotations").glob("*_exp.npy"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise DataError(f"'{folder / 'annotations'}': no files NUMBER_exp.npy")
    cases, others = [], 0
    for path in files:
        number = path.name.removesuffix("_exp.npy")
        try:
            expression = int(np.load(path, allow_pickle=False).item())
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: holds no number of an expression ({error})") from error
        if expression in _AFFECTNET_OTHERS or (expression == 7 and labels is AFFECTNET7):
            others += 1
            continue
        image = existing(folder / "images" / f"{number}.jpg", str(path))
        cases.append(label_case(number, image, QUESTION, labels, official(labels, expression, str(path)), {}))
    notes = (f"pictures of other expressions, left out: {others}",) if others else ()
    return FaceSet(name, tuple(cases), notes=notes)


@registry.register("face_set", "rafdb")
def rafdb(source: Source) -> FaceSet:
    """RAF-DB, basic emotions: EmoLabel/list_patition_label.txt and Image/aligned or Image/original."""
    split = source.splits({"test": "test_", "train": "train_"}, "test")
    path = source.file("EmoLabel/list_patition_label.txt", "basic/EmoLabel/list_patition_label.txt")
    images = path.parent.parent / "Image"
    ending = "_aligned" if (images / "aligned").is_dir() else ""
    folder = images / ("aligned" if ending else "original")
    cases = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}, line {number}"
        name, _, label = line.strip().partition(" ")
        if not name:
            continue
        if not label.strip().isdecimal():
            raise DataError(f"{where}: found '{line.strip()}', expected a picture and a label from 1 to 7")
        if name.startswith(split):
            stem, _, suffix = name.rpartition(".")
            emotion = official(RAF_DB, int(label) - 1, where)
            image = existing(folder / f"{stem}{ending}.{suffix}", where)
            cases.append(label_case(stem, image, QUESTION, RAF_DB, emotion, {}))
    return _non_empty(FaceSet("rafdb", tuple(cases)), path)


@registry.register("face_set", "fer2013")
def fer2013(source: Source) -> FaceSet:
    """FER2013: fer2013.csv with emotion, pixels and Usage; pictures are written beside the answers."""
    usage = source.splits(_FER_SPLITS, "test")
    path = source.file("fer2013.csv", "fer2013/fer2013.csv")
    cases = []
    for number, row in _rows(path, ("emotion", "pixels", "Usage")):
        if row["Usage"] == usage:
            where = f"{path}, line {number + 2}"
            label = official(FER2013, _whole(row["emotion"], where), where)
            image = _picture(row["pixels"], source.cache / f"fer{number:07d}.png", where)
            cases.append(label_case(f"fer{number:07d}", image, QUESTION, FER2013, label, {}))
    return _non_empty(FaceSet("fer2013", tuple(cases)), path)


@registry.register("face_set", "ferplus")
def ferplus(source: Source) -> FaceSet:
    """FERPlus: fer2013new.csv with votes, and FER2013Test/ or fer2013.csv; more than half of the votes decide."""
    usage = source.splits(_FER_SPLITS, "test")
    path = source.file("fer2013new.csv", "fer2013new/fer2013new.csv")
    folder = next((at for at in (source.root, source.root / "data") if (at / _FERPLUS_FOLDERS[usage]).is_dir()), None)
    table = None if folder is not None else source.file("fer2013.csv", "fer2013/fer2013.csv")
    pixels = {} if table is None else {number: row["pixels"] for number, row in _rows(table, ("pixels", "Usage"))}
    cases: list[Case] = []
    undecided = 0
    for number, row in _rows(path, ("Usage", "Image name", *_FERPLUS_COLUMNS)):
        if row["Usage"] != usage:
            continue
        where = f"{path}, line {number + 2}"
        votes = [_whole(row[column], where) for column in _FERPLUS_COLUMNS]
        best = max(range(len(votes)), key=votes.__getitem__)
        if 2 * votes[best] <= sum(votes) or best >= len(FERPLUS.labels) or not row["Image name"]:
            undecided += 1
            continue
        if folder is not None:
            image = existing(folder / _FERPLUS_FOLDERS[usage] / row["Image name"], where)
        elif number in pixels:
            image = _picture(pixels[number], source.cache / f"fer{number:07d}.png", where)
        else:
            raise DataError(f"{where}: '{table}' has no row of this number")
        cases.append(label_case(f"fer{number:07d}", image, QUESTION, FERPLUS, FERPLUS.labels[best], {}))
    notes = (f"pictures without an emotion that has more than half of the votes, left out: {undecided}",)
    return _non_empty(FaceSet("ferplus", tuple(cases), notes=notes if undecided else ()), path)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with their numbers, counted from 0. Raises DataError for a column that is missing."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        for column in columns:
            if column not in names:
                raise DataError(f"{path}: no column '{column}'{nearest(column, names)}; found: {', '.join(names)}")
        yield from enumerate(reader)


def _whole(text: str, where: str) -> int:
    if not text.strip().isdecimal():
        raise DataError(f"{where}: found '{text}', expected a whole number")
    return int(text)


def _picture(pixels: str, path: Path, where: str) -> Path:
    """A grey picture of 48 x 48 values, as a file."""
    if path.is_file():
        return path
    values = pixels.split()
    if len(values) != _SIDE * _SIDE or not all(value.isdecimal() and int(value) < 256 for value in values):
        raise DataError(f"{where}: column 'pixels' holds {len(values)} values, expected {_SIDE * _SIDE} from 0 to 255")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    Image.fromarray(np.array(values, dtype=np.uint8).reshape(_SIDE, _SIDE)).save(draft, format="PNG")
    draft.replace(path)
    return path


def _non_empty(found: FaceSet, path: Path) -> FaceSet:
    if not found.cases:
        raise DataError(f"{path}: holds no pictures of this split")
    return found
