"""Questions about many pictures: ``minigpt4 predict``'s engine in batches against one question after another.

    python benchmarks/predict.py                       192 pictures, 3 alternating rounds, gated
    python benchmarks/predict.py --quick --json out.json

The tiny MiniGPT-v2 of the tests (EVA-like 64 x 3 at 112 px, Llama 64 x 2) on the CPU in float32, one thread, greedy,
20 new tokens, one JPEG of 448 x 448 per question. One by one is the same engine with ``batch_size`` 1. Both must give
the same answers before any figure is printed. Times are CPU-seconds, reading and scaling the pictures included.
A mid-size model (the one of train_step.py) is measured beside it: there arithmetic weighs more than Python's overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
GATE, MOONSHOT = 4.0, 8.0
BATCHES = (16, 32)
TEXTS = ("Who is this?", "What is the emotion of the person in the photo?", "Is he happy, or is he sad?")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 1 when the gate is missed in the gated mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=192, help="pictures, one question each (default 192)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that take turns (default 3)")
    parser.add_argument("--quick", action="store_true", help="one round of 64 pictures, the tiny model alone, ungated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    given = parser.parse_args(argv)
    count, rounds = (64, 1) if given.quick else (given.pictures, given.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {"tiny": compare(tiny(), questions(folder, count), rounds)}
        report("tiny", figures["tiny"])
        if not given.quick:
            figures["mid-size"] = compare(mid_size(folder), questions(folder, 48), 1)
            report("mid-size", figures["mid-size"])
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    best = figures["tiny"][f"ratio_{BATCHES[0]}"]
    if best < GATE and not given.quick:
        print(f"gate missed: {best:.2f}, at least {GATE}")
        return 1
    return 0


def tiny() -> Any:
    """The assistant of the tests."""
    from tests.evaluation_parts import tiny_assistant

    return tiny_assistant()


def mid_size(folder: Path) -> Any:
    """An assistant around the model of the training benchmark."""
    from benchmarks.train_step import build_language_model
    from benchmarks.train_step_worker import build_model
    from minigpt4.chat.loading import Assistant
    from minigpt4.common.schema import ProcessorConfig
    from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor

    build_language_model(folder)
    model: Any = build_model(folder).eval()
    image = make_image_processor(ProcessorConfig(name="blip2_image_eval"), ImageSpec(model.cfg.image_size))
    return Assistant(model, image, make_text_processor(ProcessorConfig()), "minigpt_v2")


def questions(folder: Path, count: int) -> list[Any]:
    """One question per picture; the pictures are drawn once."""
    from PIL import Image

    from minigpt4.evaluation.questions import Question

    found = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        if not path.exists():
            colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
            picture = Image.linear_gradient("L").resize((448, 448)).convert("RGB")
            Image.blend(picture, Image.new("RGB", picture.size, colour), 0.5).save(path)
        found.append(Question(str(number), (str(path),), TEXTS[number % len(TEXTS)]))
    return found


def compare(assistant: Any, asked: Sequence[Any], rounds: int) -> dict[str, Any]:
    """Pictures per CPU-second for every batch size, and ratios. Raises SystemExit when answers differ."""
    import torch

    from minigpt4.common import dist
    from minigpt4.evaluation.engine import AnswerOptions, answer_all
    from minigpt4.models.generation import GenerateOptions

    torch.set_num_threads(1)
    options = AnswerOptions(GenerateOptions(max_new_tokens=20, min_new_tokens=20))
    alone = dist.single("cpu")
    answer_all(assistant, asked[:4], None, options, alone)  # first touch of weights and files
    rates: dict[int, list[float]] = {size: [] for size in (1, *BATCHES)}
    texts: list[str] = []
    for number in range(rounds):
        for size in sorted(rates, reverse=number % 2 == 1):
            begun = time.process_time()
            answers = answer_all(assistant, asked, None, replace(options, batch_size=size), alone)
            rates[size].append(len(asked) / (time.process_time() - begun))
            found = [answer.text for answer in answers]
            texts = texts or found
            if found != texts or any(answer.error for answer in answers):
                raise SystemExit(f"batches of {size} give other answers; no figure is printed")
    single = statistics.median(rates[1])
    medians = {f"rate_{size}": statistics.median(values) for size, values in rates.items()}
    ratios = {f"ratio_{size}": medians[f"rate_{size}"] / single for size in BATCHES}
    spread = {"single_spread": [min(rates[1]) / single, max(rates[1]) / single]}
    return {"pictures": len(asked), **medians, **ratios, **spread}


def report(size: str, figures: dict[str, Any]) -> None:
    """The figures as lines."""
    print(f"{size} model, {figures['pictures']} pictures: the same answers; pictures per CPU-second")
    print(f"  one by one    {figures['rate_1']:8.2f}")
    for batch in BATCHES:
        gate = f" (gate >= {GATE:g}, moonshot {MOONSHOT:g})" if size == "tiny" and batch == BATCHES[0] else ""
        print(f"  batches of {batch:<3}{figures[f'rate_{batch}']:8.2f}  {figures[f'ratio_{batch}']:.2f} x{gate}")


if __name__ == "__main__":
    sys.exit(main())
