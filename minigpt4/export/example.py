"""One question about one image, and what a model makes of it: logits and a greedy answer, on which exports agree."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minigpt4.chat.session import ChatSession, open_image
from minigpt4.common.errors import CheckpointError
from minigpt4.export.reading import library
from minigpt4.models.llm import causal_lm

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.models.generation import GenerationMixin

TOLERANCE = 1e-4
"""Largest difference of two float32 logits that is arithmetic and not another model."""
NUM_GREEDY = 12
QUESTIONS = (
    "What does the picture show?",
    "Is there a person in the picture?",
    "What does the face express?",
)


@dataclass(frozen=True)
class Example:
    """ids: prompt with IMAGE_TOKEN [T]; pixels [1, 3, S, S]; features [1, P, C'] before the projection; end: its id."""

    image: Image.Image
    question: str
    ids: list[int]
    pixels: Tensor
    features: Tensor
    end: int


@dataclass(frozen=True)
class Outputs:
    """logits [T, V] float32 of the prompt, and the next greedy ids."""

    logits: Tensor
    ids: list[int]


def draw_image(seed: int) -> Image.Image:
    """A picture of soft random colours, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (7, 9, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(np.asarray(colours)).resize((96, 80), Image.Resampling.BICUBIC)


def make_example(assistant: Assistant, image: str | Path | None, question: str | None, seed: int) -> Example:
    """The given picture and question, or drawn ones, as a first question in the chat."""
    picture = draw_image(seed) if image is None else open_image(image)
    text = random.Random(seed).choice(QUESTIONS) if question is None else question
    pixels = assistant.image_processor(picture)[None]
    with torch.no_grad():
        features = assistant.model.vision_features(pixels)
    ids, end = ChatSession.first_prompt(assistant, text).ids, assistant.model.encoder.tokenizer.eos_id
    return Example(picture, text, ids, pixels, features, end)


@torch.no_grad()
def outputs_of_model(model: GenerationMixin, example: Example, with_vision: bool = True) -> Outputs:
    """What our model answers to the pixels, or without vision to the features of the example."""
    images = example.pixels if with_vision else example.features
    embeddings = model.embed(torch.tensor([example.ids]), images, model.encoder.num_image_tokens)
    return outputs_of_lm(causal_lm(model.llama_model), embeddings, example.end)


@torch.no_grad()
def outputs_of_lm(llm: Any, embeddings: Tensor, end: int) -> Outputs:
    """What a causal LM answers to a prompt of embeddings [1, T, D]; advice of its folder is left out, as in chat."""
    llm.generation_config = library().GenerationConfig()
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    logits = llm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[0]
    ids = llm.generate(inputs_embeds=embeddings, attention_mask=mask, **greedy(end))[0]
    return Outputs(logits.float(), ids.tolist())


def greedy(end: int) -> dict[str, Any]:
    """Arguments of ``generate`` for exactly NUM_GREEDY ids: an early end would hide differences."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_new_tokens": NUM_GREEDY,
        "min_new_tokens": NUM_GREEDY,
        "eos_token_id": end,
        "pad_token_id": end,
        "use_cache": True,
    }


def compare(wanted: Outputs, found: Outputs, what: str, is_relative: bool) -> str:
    """A sentence on how close the two are. Raises CheckpointError when they are not one model.

    is_relative: for files that are computed in another order (LoRA merged, another vision code): their differences grow
    with the logits, and TOLERANCE counts in units of the largest one where that is above 1.
    """
    if wanted.logits.shape != found.logits.shape:
        raise CheckpointError(
            f"{what}: logits are {list(found.logits.shape)}, the model's are {list(wanted.logits.shape)}"
        )
    difference = float((wanted.logits - found.logits).abs().max())
    allowed = TOLERANCE * (max(1.0, float(wanted.logits.abs().max())) if is_relative else 1.0)
    if not difference <= allowed:  # a NaN is no agreement either
        raise CheckpointError(
            f"{what}: logits differ by {difference:.3g} from the model's, at most {allowed:.1g} is allowed"
        )
    if wanted.ids != found.ids:
        first = next(i for i, (a, b) in enumerate(zip(wanted.ids, found.ids, strict=True)) if a != b)
        raise CheckpointError(
            f"{what}: greedy answers differ at token {first + 1}: {found.ids[first]}, the model's {wanted.ids[first]}"
        )
    return f"logits differ by at most {difference:.1e} (allowed {allowed:.1e}), {NUM_GREEDY} greedy ids are equal"
