"""Answers of a model to many prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, Encoded, Pixels, Sample, as_floats
from minigpt4.models.generation import GenerateOptions, GenerationMixin

_CHUNK = 64
"""Samples whose pictures are held at once."""


@dataclass(frozen=True)
class Answered:
    """One generated answer beside its reference; ``reference`` is '' where none is known."""

    source: str
    question: str
    reference: str
    answer: str


def answer_prompts(
    model: GenerationMixin,
    prompts: Sequence[Encoded],
    images_of: Callable[[Sequence[int]], Tensor],
    options: GenerateOptions,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """Answers in the order of ``prompts``.

    images_of: numbers of prompts -> their pictures [N, 3, S, S] or features [N, P, C'], in that order. ``advance`` is
    told how many were answered. seeds: one per prompt, see ``GenerationMixin.generate``.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        asked, images = [prompts[i] for i in chosen], images_of(chosen)
        if seeds is None:
            texts = model.generate(asked, images, options)
        else:
            texts = model.generate(asked, images, options, seeds=[seeds[i] for i in chosen])
        for i, answer in zip(chosen, texts, strict=True):
            answers[i] = answer
        advance(len(chosen))
    return answers


def answer_samples(
    model: GenerationMixin,
    samples: Callable[[int], Sample],
    numbers: Sequence[int],
    options: GenerateOptions,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answered]:
    """The model's answer to the last question of every sample, after the sample's own earlier turns."""
    result: list[Answered] = []
    for start in range(0, len(numbers), _CHUNK):
        chunk = [samples(number) for number in numbers[start : start + _CHUNK]]
        prompts = [model.encoder.encode_prompt(sample.turns[:-1], sample.turns[-1].prompt) for sample in chunk]
        pictures = [sample.images[: prompt.num_images] for sample, prompt in zip(chunk, prompts, strict=True)]

        def images_of(chosen: Sequence[int], pictures: Sequence[tuple[Tensor | Pixels, ...]] = pictures) -> Tensor:
            return stacked([image for i in chosen for image in pictures[i]])

        answers = answer_prompts(model, prompts, images_of, options, batch_size, advance)
        result += [
            Answered(sample.sample_id, shown_question(sample.turns[-1].prompt), sample.turns[-1].answer, answer)
            for sample, answer in zip(chunk, answers, strict=True)
        ]
    return result


def stacked(images: Sequence[Tensor | Pixels]) -> Tensor:
    """Pictures as one tensor [N, 3, S, S]; none give [0, 3, 1, 1]."""
    return torch.stack([as_floats(image) for image in images]) if images else torch.zeros(0, 3, 1, 1)


def shown_question(prompt: str) -> str:
    """A prompt as a person would say it: without picture tags."""
    return " ".join(prompt.replace(IMAGE_PROMPT, " ").replace(IMAGE_TAG, " ").split())
