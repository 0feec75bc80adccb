"""A tiny assistant, pictures and ranks for what answers many questions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minigpt4 import catalog
from minigpt4.chat.loading import Assistant
from minigpt4.common.dist import DistContext
from minigpt4.common.schema import ProcessorConfig
from minigpt4.evaluation.questions import Question
from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor
from tests.golden_cases import build_model, load_case

CPU = torch.device("cpu")
ALONE = DistContext(0, 1, 0, CPU)
COLOURS = ("red", "green", "blue", "white", "black", "orange")
TEXTS = ("who?", "what is the emotion of the person in the photo?", "is he happy or sad?")


def tiny_assistant() -> Assistant:
    """The recorded MiniGPT-v2 with random weights."""
    catalog.load()
    model: Any = build_model(load_case("c_minigptv2_lora_instruction"))
    image = make_image_processor(ProcessorConfig(name="blip2_image_eval"), ImageSpec(112))
    return Assistant(model, image, make_text_processor(ProcessorConfig()), "minigpt_v2")


def draw_pictures(folder: Path, count: int = 6, suffix: str = ".png") -> list[Path]:
    """Pictures of one colour each."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}{suffix}" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (40 + number, 30), COLOURS[number % len(COLOURS)]).save(path)
    return paths


def some_questions(pictures: Sequence[Path], count: int = 12) -> list[Question]:
    return [
        Question(f"q{i}", (str(pictures[i % len(pictures)]),), TEXTS[i % len(TEXTS)], {"number": i})
        for i in range(count)
    ]


@dataclass
class Exchange:
    """Where ranks of one process meet."""

    size: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier, self.values = threading.Barrier(self.size, timeout=60), [None] * self.size


@dataclass(frozen=True)
class ThreadContext(DistContext):
    """A rank that is a thread."""

    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def gather_objects(self, value: Any) -> list[Any]:
        self.exchange.values[self.rank] = value
        self.exchange.barrier.wait()
        values = list(self.exchange.values)
        self.exchange.barrier.wait()
        return values

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def barrier(self) -> None:
        self.gather_objects(None)


def on_ranks(count: int, work: Callable[[DistContext], Any]) -> list[Any]:
    """What ``work`` returns, or the error it raises, on each of ``count`` ranks."""
    exchange = Exchange(count)
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadContext(rank, count, 0, CPU, exchange=exchange))
        except Exception as error:  # handed to the test
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
