"""A tiny real model whose answers are written beforehand, for tests of what is done with answers."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from functools import cache
from typing import Any

from minigpt4 import catalog
from minigpt4.chat.loading import Assistant
from minigpt4.common.schema import ProcessorConfig
from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor
from tests.golden_cases import build_model, load_case


@cache
def tiny_assistant() -> Assistant:
    """The tiny MiniGPT-v2 of the golden cases: random weights, real tokenizer, real vision tower."""
    catalog.load()
    model: Any = build_model(load_case("c_minigptv2_lora_instruction"))
    image = ImageSpec(model.cfg.image_size, model.image_mean, model.image_std)
    return Assistant(
        model.eval(),
        make_image_processor(ProcessorConfig(name="blip2_image_eval"), image),
        make_text_processor(ProcessorConfig(name="identity")),
        "minigpt_v2",
    )


class Scripted:
    """Stands in for the model of ``tiny_assistant``: everything is the model's own but the words of the answers.

    ``asked`` holds the prompts that came, spelt out. ``seconds``: between two words.
    """

    def __init__(self, *answers: str, seconds: float = 0.0) -> None:
        self._model = tiny_assistant().model
        self.answers, self.seconds = list(answers), seconds
        self.asked: list[str] = []
        self.num_words = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate_stream(self, prompt: Any, images: Any, options: Any, cache: Any = None) -> Generator[str, None, str]:
        ids = [i for i in prompt.ids if i >= 0]
        self.asked.append(self.encoder.tokenizer.spell(ids))
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        words = answer.split(" ")
        for number, word in enumerate(words):
            time.sleep(self.seconds)
            self.num_words += 1
            yield word if number == 0 else f" {word}"
        return answer


def scripted_assistant(*answers: str, seconds: float = 0.0) -> tuple[Assistant, Scripted]:
    """An assistant that says ``answers`` in order, the last one again and again; and what it was asked."""
    model = Scripted(*answers, seconds=seconds)
    stand_in: Any = model
    return replace(tiny_assistant(), model=stand_in), model
