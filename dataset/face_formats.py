"""Writes drawn faces in the annotation formats of the real data sets."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import face_text as ft
from face_drawing import SIZE, Box, Scene

Record = dict[str, Any]
_LEAST_SIDE = 2.0
"""Pixels of a box that can be asked for."""
_PLACES: dict[int, tuple[str, ...]] = {0: (), 2: ("left", "right"), 3: ("left", "middle", "right")}


@dataclass(frozen=True)
class Item:
    """One picture on disk. ``path`` is relative to the root of the data, with forward slashes."""

    key: str
    path: str
    scene: Scene
    boxes: tuple[dict[str, Box], ...]


def box_text(box: Box) -> str:
    """Pixels -> ``{<x1><y1><x2><y2>}`` in percent, truncated toward zero; clipped to the picture."""
    x1, y1, x2, y2 = (int(min(max(value, 0.0), float(SIZE)) / SIZE * 100) for value in box)
    return f"{{<{x1}><{y1}><{x2}><{y2}>}}"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _balanced(items: Sequence[Item], kind: str, rng: random.Random, limit: int | None = None) -> list[Item]:
    """Items for which ``kind`` can be asked, the same number for each answer, shuffled."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        answer = ft.answers_of(item.scene).get(kind)
        if answer is not None:
            groups["" if kind == ft.DESCRIPTION else answer].append(item)
    if not groups:
        return []
    share = min(len(group) for group in groups.values())
    if limit is not None:
        share = min(share, max(1, limit // len(groups)))
    chosen = [item for answer in sorted(groups) for item in rng.sample(groups[answer], share)]
    rng.shuffle(chosen)
    return chosen


def _conversation(item: Item, number: int, turns: Sequence[tuple[str, str]]) -> Record:
    """A LLaVA-style record; the first human turn names the picture."""
    conversation: list[dict[str, str]] = []
    for index, (asked, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": f"<image>\n{asked}" if index == 0 else asked})
        conversation.append({"from": "gpt", "value": answer})
    return {"id": f"face_{number:06d}", "image": item.path, "conversations": conversation}


def _singles(items: Iterable[Item]) -> list[Item]:
    return [item for item in items if len(item.scene.people) == 1]


def sharegpt_records(items: Sequence[Item], rng: random.Random) -> list[Record]:
    """ShareGPT4V-shaped: balanced single questions over all types, and conversations of two to four turns."""
    records: list[Record] = []
    for kind in ft.QUESTION_TYPES:
        source = _singles(items) if kind == ft.DESCRIPTION else items
        limit = None if kind in ("expression", "number of people", "human or not") else len(items) // 3
        for item in _balanced(source, kind, rng, limit):
            turns = [(ft.question(kind, rng), ft.answers_of(item.scene)[kind])]
            records.append(_conversation(item, len(records), turns))
    for item in rng.sample(_singles(items), len(_singles(items)) // 4):
        facts = ft.answers_of(item.scene)
        kinds = rng.sample(
            [kind for kind in facts if kind not in ("human or not", "number of people")], rng.randint(2, 4)
        )
        records.append(_conversation(item, len(records), [(ft.question(kind, rng), facts[kind]) for kind in kinds]))
    rng.shuffle(records)
    return records


_SECTIONS: dict[str, tuple[str, ...]] = {
    "Facial Expression due to contextual cues": ("expression",),
    "Facial Characteristics Long": (ft.DESCRIPTION,),
    "Factual Generalization": ("hair colour",),
    "Mouvement Description": ("head pose",),
    "Interpretative Generalization": ("gaze",),
    "Posture": ("head pose",),
    "Facial Characteristics Short": ("hair style",),
    "Human or not": ("human or not",),
    "Feature by Feature Description": ("glasses", "beard"),
    "Fitzpatrick": ("skin tone",),
    "Multi-Person Interaction": ("number of people",),
}
SECTION_NAMES = (
    "Pre-Prompt",
    "Facial Expression due to contextual cues",
    "Facial Characteristics Long",
    "Factual Generalization",
    "Mouvement Description",
    "Interpretative Generalization",
    "Intensity of the emotion",
    "Posture",
    "Race",
    "Race and Gender",
    "Facial Characteristics Short",
    "Gender",
    "Human or not",
    "Feature by Feature Description",
    "Fitzpatrick",
    "Multi-Person Interaction",
)
"""All sections of a FaceGPT4Vision annotation file, spelled as there."""


def _strong_emotion(items: Sequence[Item], rng: random.Random) -> list[tuple[Item, str, str]]:
    """Half of the faces neutral, half not."""
    neutral = [item for item in _singles(items) if item.scene.people[0].expression == "neutral"]
    other = [item for item in _singles(items) if item.scene.people[0].expression != "neutral"]
    count = min(len(neutral), len(other))
    pairs = [(item, "No") for item in rng.sample(neutral, count)] + [(item, "Yes") for item in rng.sample(other, count)]
    return [(item, rng.choice(ft.STRONG_EMOTION), answer) for item, answer in pairs]


def section_records(items: Sequence[Item], per_section: int, rng: random.Random) -> dict[str, list[Record]]:
    """FaceGPT4Vision-shaped: section name -> records, no section empty."""
    sections: dict[str, list[Record]] = {}
    number, singles = 0, _singles(items)
    for name in SECTION_NAMES:
        rows: list[tuple[Item, str, str]] = []
        if name in _SECTIONS:
            for kind in _SECTIONS[name]:
                source = singles if kind == ft.DESCRIPTION else items
                chosen = _balanced(source, kind, rng, per_section // len(_SECTIONS[name]))
                rows += [(item, ft.question(kind, rng), ft.answers_of(item.scene)[kind]) for item in chosen]
        elif name == "Intensity of the emotion":
            rows = _strong_emotion(items, rng)[:per_section]
        elif name == "Pre-Prompt":
            rows = [
                (item, rng.choice(ft.GENERAL), ft.description(item.scene))
                for item in rng.sample(list(items), min(4, len(items)))
            ]
        else:
            chosen = rng.sample(singles, min(per_section // 4, len(singles)))
            rows = [(item, rng.choice(ft.NOT_SHOWN[name]), ft.NOT_SHOWN_ANSWER) for item in chosen]
        rng.shuffle(rows)
        sections[name] = []
        for item, asked, answer in rows:
            sections[name].append(_conversation(item, number, [(asked, answer)]))
            number += 1
    return sections


def test_records(items: Sequence[Item], per_type: int, rng: random.Random) -> list[Record]:
    """Flat question records: image, type, question, answer; the answers of every closed type equally often."""
    records: list[Record] = []
    for kind in ft.QUESTION_TYPES:
        source = _singles(items) if kind == ft.DESCRIPTION else items
        limit = per_type // 2 if kind == ft.DESCRIPTION else per_type
        for item in _balanced(source, kind, rng, limit):
            answer = ft.answers_of(item.scene)[kind]
            records.append({"image": item.path, "type": kind, "question": ft.QUESTIONS[kind][0], "answer": answer})
    return records


def box_records(items: Iterable[Item]) -> list[Record]:
    """One record per face: boxes in pixels and as box text; parts named face, eyes, mouth, glasses."""
    records: list[Record] = []
    for item in items:
        for boxes in item.boxes:
            parts = {
                name: {
                    "bbox": _corner_and_size(box),
                    "text": box_text(box),
                }
                for name, box in boxes.items()
            }
            records.append(
                {"image": item.path, "width": SIZE, "height": SIZE, "people": len(item.scene.people), "boxes": parts}
            )
    return records


def refer_records(items: Iterable[Item]) -> list[Record]:
    """``image``, ``phrase`` and ``box`` in pixels, x y width height: parts of one face, or one of several faces."""
    return [
        {"image": item.path, "phrase": phrase, "box": _corner_and_size(box)}
        for item in items
        for phrase, box in _phrases(item)
    ]


def detection_records(items: Iterable[Item]) -> list[Record]:
    """``image``, ``phrase`` and ``bbox``: all faces of a picture as text."""
    return [
        {"image": item.path, "phrase": "faces", "bbox": "<delim>".join(box_text(boxes["face"]) for boxes in item.boxes)}
        for item in items
        if item.boxes
    ]


def write_expressions(root: Path, items: Iterable[Item]) -> int:
    """Files of RefCOCO's evaluation: ``refcoco/refcoco_val.json``, pictures with names of 27 letters. Returns how many.

    ``img_id`` is the picture's name and a number; ``bbox`` is x y width height in pixels.
    """
    (root / "refcoco_images").mkdir(parents=True)
    records: list[Record] = []
    for item in items:
        name = f"DRAWN_test_{item.key:0>16}"
        phrases = list(_phrases(item))
        if phrases:
            (root / "refcoco_images" / f"{name}.jpg").write_bytes((root.parent / item.path).read_bytes())
        for number, (phrase, box) in enumerate(phrases):
            record = {"img_id": f"{name}_{number}", "sents": phrase, "bbox": _corner_and_size(box)}
            records.append({**record, "height": SIZE, "width": SIZE})
    write_json(root / "refcoco" / "refcoco_val.json", records)
    return len(records)


def _phrases(item: Item) -> Iterator[tuple[str, Box]]:
    """What can be pointed at, and its box; a line without height, as some mouths are, is left out."""
    if len(item.boxes) == 1:
        named = [(f"the {name}", box) for name, box in item.boxes[0].items()]
    else:
        places = _PLACES[len(item.boxes)]
        named = [(f"the {place} face", boxes["face"]) for place, boxes in zip(places, item.boxes, strict=True)]
    return ((phrase, box) for phrase, box in named if min(box[2] - box[0], box[3] - box[1]) >= _LEAST_SIDE)


def _corner_and_size(box: Box) -> list[float]:
    return [round(value, 1) for value in (box[0], box[1], box[2] - box[0], box[3] - box[1])]


def write_csv(path: Path, records: Sequence[Record], columns: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({column: record[column] for column in columns} for record in records)


def write_shards(root: Path, items: Sequence[Item], shard_size: int) -> list[Path]:
    """webdataset tars as img2dataset leaves them: <key>.jpg, <key>.txt, <key>.json per picture."""
    folder = root / "shards"
    folder.mkdir(parents=True)
    paths = []
    for shard, start in enumerate(range(0, len(items), shard_size)):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for offset, item in enumerate(items[start : start + shard_size]):
                key, text = f"{shard:05d}{offset:04d}", ft.caption(item.scene)
                meta = json.dumps({"caption": text, "key": key, "status": "success", "width": SIZE, "height": SIZE})
                _add(tar, f"{key}.jpg", (root / item.path).read_bytes())
                _add(tar, f"{key}.txt", text.encode())
                _add(tar, f"{key}.json", meta.encode())
        paths.append(path)
    return paths


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_align(root: Path, items: Sequence[Item]) -> None:
    """cc_sbu_align: filter_cap.json and image/<image_id>.jpg."""
    (root / "align" / "image").mkdir(parents=True)
    for item in items:
        (root / "align" / "image" / f"{item.key}.jpg").write_bytes((root / item.path).read_bytes())
    annotations = [{"image_id": item.key, "caption": ft.description(item.scene)} for item in items]
    write_json(root / "align" / "filter_cap.json", {"annotations": annotations})
