"""Writes scikit-image's photographs: 100 small faces, 100 pieces without a face, three pictures for chat.

    python dataset/write_photos.py --out quickstart_photos

The faces are the 25-pixel grey crops of ``skimage.data.lfw_subset()`` (part of the package, nothing is downloaded),
enlarged to 112 pixels. Writes train.csv and test.csv with the columns image, question, answer.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from face_drawing import SIZE
from face_formats import write_csv
from PIL import Image
from rich.console import Console
from skimage import data

QUESTION = "Is this a human face?"
CHAT_PICTURES = ("astronaut", "chelsea", "coffee")
NUM_FACES = 100
"""lfw_subset holds this many faces first, then as many pictures without a face."""


def save_pictures(folder: Path) -> list[dict[str, str]]:
    """Enlarges all 200 crops bicubically and returns their records."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index, crop in enumerate(data.lfw_subset()):  # type: ignore[no-untyped-call]
        is_face = index < NUM_FACES
        path = f"images/{'face' if is_face else 'other'}_{index % NUM_FACES:03d}.png"
        grey = Image.fromarray((np.clip(crop, 0, 1) * 255).round().astype(np.uint8))
        grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(folder / path)
        records.append({"image": path, "question": QUESTION, "answer": "Yes" if is_face else "No"})
    return records


def split_records(
    records: Sequence[dict[str, str]], test_share: float, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Balanced train and test lists; the same for the same seed."""
    rng = random.Random(seed)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for answer in ("Yes", "No"):
        group = [record for record in records if record["answer"] == answer]
        rng.shuffle(group)
        held_out = round(len(group) * test_share)
        test += group[:held_out]
        train += group[held_out:]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write the photographs of scikit-image as a face / no face data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=1, help="shuffle of the split (default: 1)")
    args = parser.parse_args(argv)
    console = Console()
    if (args.out / "train.csv").is_file():
        console.print(f"{args.out}: already complete, kept as it is")
        return
    if args.out.exists():
        parser.error(f"{args.out} exists and holds no train.csv")
    part = args.out.with_name(f".{args.out.name}.part-{os.getpid()}")
    try:
        train, test = split_records(save_pictures(part), 0.3, args.seed)
        for name in CHAT_PICTURES:
            Image.fromarray(getattr(data, name)()).convert("RGB").save(part / f"{name}.png")
        write_csv(part / "test.csv", test, ("image", "question", "answer"))
        write_csv(part / "train.csv", train, ("image", "question", "answer"))
        part.rename(args.out)
    finally:
        if part.exists():
            shutil.rmtree(part)
    console.print(f"{args.out}: {len(train)} training and {len(test)} test photographs, and {', '.join(CHAT_PICTURES)}")


if __name__ == "__main__":
    main()
