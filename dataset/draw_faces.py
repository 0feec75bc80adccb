"""Draws a small face data set in the formats of the real ones, for a machine without any downloaded data.

    python dataset/draw_faces.py --out quickstart_data --seed 1 --train 4000 --test 400

Deterministic in (seed, sizes). The folder appears under its final name only when it is complete; a second run with
the same settings keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import face_drawing as fd
import face_formats as ff
import face_text as ft
import numpy as np
from face_drawing import Drawing, Person, Scene
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scene_drawing import draw_scene, random_person

DRAWING_VERSION = 4
"""Raised when the same settings would give other files, so that old folders are not taken for new ones."""
SPLITS = {"train": 11, "test": 12, "pretrain": 13}
"""Part of the generator's key, so that no face of one split occurs in another, whatever the seed."""
_SHARES = ((2, 0.12), (3, 0.12), (0, 0.16))
"""Pictures by number of people; the rest shows one person."""


def plan_scenes(seed: int, split: str, count: int) -> list[Scene]:
    """What every picture of a split shows. Each attribute's values occur equally often among single persons."""
    rng = np.random.default_rng([seed, SPLITS[split], 0])
    numbers = [people for people, share in _SHARES for _ in range(round(count * share))]
    numbers += [1] * (count - len(numbers))
    singles = iter(_balanced_people(numbers.count(1), rng))
    scenes = []
    for people in rng.permutation(numbers).tolist():
        scenes.append(Scene((next(singles),) if people == 1 else tuple(random_person(rng) for _ in range(people))))
    return scenes


def _balanced_people(count: int, rng: np.random.Generator) -> list[Person]:
    def column(values: Sequence[Any], length: int = count) -> list[Any]:
        repeated = [values[index % len(values)] for index in range(length)]
        return [repeated[index] for index in rng.permutation(length).tolist()]

    styles = column(fd.HAIR_STYLES)
    with_hair = iter(column(fd.HAIR_COLOURS, sum(style != "bald" for style in styles)))
    bald = iter(column(fd.HAIR_COLOURS, styles.count("bald")))
    people = []
    others = zip(
        column(fd.EXPRESSIONS),
        column(fd.SKIN_TYPES),
        column((True, False)),
        column((True, False)),
        column(fd.POSES),
        column(fd.GAZES),
        strict=True,
    )
    for style, (expression, skin, glasses, beard, pose, gaze) in zip(styles, others, strict=True):
        colour = next(bald) if style == "bald" else next(with_hair)
        people.append(Person(expression, colour, style, skin, glasses, beard, pose, gaze))
    return people


def draw_one(seed: int, split: str, index: int, scene: Scene) -> Drawing:
    """Picture ``index`` of a split: a pure function of its arguments."""
    return draw_scene(scene, np.random.default_rng([seed, SPLITS[split], 1, index]))


def draw_split(root: Path, seed: int, split: str, count: int, progress: Progress) -> list[ff.Item]:
    """Draws and saves one split as images/<split>/<index>.jpg."""
    folder = root / "images" / split
    folder.mkdir(parents=True)
    task = progress.add_task(f"drawing {split}", total=count, rate="")
    started, items = time.perf_counter(), []
    for index, scene in enumerate(plan_scenes(seed, split, count)):
        drawing = draw_one(seed, split, index, scene)
        path = f"images/{split}/{index:06d}.jpg"
        drawing.image.save(root / path, quality=92)
        items.append(ff.Item(f"{index:06d}", path, scene, drawing.boxes))
        if index % 50 == 49 or index + 1 == count:
            rate = (index + 1) / (time.perf_counter() - started)
            progress.update(task, completed=index + 1, rate=f"{rate:.0f} images/s")
    return items


def write_formats(root: Path, train: list[ff.Item], test: list[ff.Item], args: argparse.Namespace) -> dict[str, int]:
    """All annotation files. Returns the number of records per file."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{args.seed}/{name}")

    shards = ff.write_shards(root, train, args.shard_size)
    align = rng("align").sample(train, min(args.align, len(train)))
    ff.write_align(root, align)
    sharegpt = ff.sharegpt_records(train, rng("sharegpt"))
    ff.write_json(root / "sharegpt" / "sharegpt_faces.json", sharegpt)
    sections = ff.section_records(train, args.per_section, rng("sections"))
    ff.write_json(root / "facegpt4vision" / "by_section.json", sections)
    emotions = {item.path: ft.emotion_text(item.scene) for item in train if len(item.scene.people) == 1}
    ff.write_json(root / "emotions" / "emotions.json", emotions)
    ff.write_json(root / "boxes" / "train.json", ff.box_records(train))
    ff.write_json(root / "boxes" / "test.json", ff.box_records(test))
    refer = ff.refer_records(train)
    ff.write_json(root / "boxes" / "refer.json", refer)
    ff.write_json(root / "boxes" / "detection.json", ff.detection_records(train))
    expressions = ff.write_expressions(root / "boxes", test)
    questions = ff.test_records(test, args.test_per_type, rng("test"))
    ff.write_json(root / "test" / "questions.json", questions)
    ff.write_csv(root / "test" / "questions.csv", questions, ("image", "type", "question", "answer"))
    return {
        "shards": len(shards),
        "captions": len(train),
        "align": len(align),
        "sharegpt": len(sharegpt),
        "facegpt4vision": sum(map(len, sections.values())),
        "emotions": len(emotions),
        "boxes": len(refer),
        "test expressions": expressions,
        "test questions": len(questions),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw faces and write them in the formats of the real data sets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=1, help="other seed, other faces")
    parser.add_argument("--train", type=int, default=4000, help="number of training pictures")
    parser.add_argument("--test", type=int, default=400, help="number of test pictures")
    parser.add_argument(
        "--align", type=int, default=400, help="pictures of the alignment set (second stage of MiniGPT-4)"
    )
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures per tar shard")
    parser.add_argument(
        "--per-section", type=int, default=600, help="at most this many records per FaceGPT4Vision section"
    )
    parser.add_argument("--test-per-type", type=int, default=120, help="at most this many test questions per type")
    parser.add_argument("--force", action="store_true", help="replace a folder that was made with other settings")
    args = parser.parse_args(argv)
    if args.train < 100 or args.test < 100:
        parser.error("--train and --test must be at least 100, else some answers never occur")
    if not 1 <= args.shard_size <= 10000:
        parser.error("--shard-size must lie in 1..10000")
    return args


def _settings(args: argparse.Namespace) -> dict[str, int]:
    names = ("seed", "train", "test", "align", "shard_size", "per_section", "test_per_type")
    return {"drawing_version": DRAWING_VERSION, **{name: int(getattr(args, name)) for name in names}}


def _existing(out: Path, settings: dict[str, int], force: bool, console: Console) -> bool:
    """Whether ``out`` can be kept. Leaves the program when it holds something else."""
    manifest = out / "manifest.json"
    if not out.exists():
        return False
    if manifest.is_file() and json.loads(manifest.read_text())["settings"] == settings:
        console.print(f"{out}: already complete with these settings, kept as it is")
        return True
    if not force or not manifest.is_file():
        reason = (
            "was made with other settings; --force replaces it"
            if manifest.is_file()
            else "exists and is no folder of drawn faces"
        )
        console.print(f"{out}: {reason}", style="red")
        sys.exit(2)
    return False


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = parse_args(argv)
    console, settings = Console(), _settings(args)
    if _existing(args.out, settings, args.force, console):
        return
    part = args.out.with_name(f".{args.out.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            train = draw_split(part, args.seed, "train", args.train, progress)
            test = draw_split(part, args.seed, "test", args.test, progress)
        counts = write_formats(part, train, test, args)
        ff.write_json(part / "manifest.json", {"settings": settings, "counts": counts})
        if args.out.exists():
            shutil.rmtree(args.out)
        part.rename(args.out)
    finally:
        if part.exists():
            shutil.rmtree(part)
    console.print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
