"""Ask a model questions about images and score its answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import ChatSession, open_image
from minigpt4.common.errors import DataError
from minigpt4.models.generation import GenerateOptions
from minigpt4.tasks.answering import answer_prompts


@dataclass(frozen=True)
class Question:
    """One question about one image file, with its reference answer and the type it is reported under."""

    image: Path
    type: str
    question: str
    answer: str


def read_questions(path: Path, image_root: Path, default_type: str = "all") -> list[Question]:
    """Records ``image, question, answer`` (and ``type``) of a JSON list or a CSV file. Raises DataError."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            records: list[dict[str, str]] = list(csv.DictReader(file))
    else:
        records = json.loads(path.read_text(encoding="utf-8"))
    questions = []
    for number, record in enumerate(records):
        missing = [key for key in ("image", "question", "answer") if not record.get(key)]
        if missing:
            raise DataError(f"{path}, record {number}: field '{missing[0]}' is missing or empty; found: {list(record)}")
        image = image_root / record["image"]
        questions.append(Question(image, record.get("type", default_type), record["question"], record["answer"]))
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return questions


def answer_questions(
    assistant: Assistant,
    questions: Sequence[Question],
    options: GenerateOptions,
    batch_size: int = 32,
    is_blank: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Answers in the order of ``questions``, each in a conversation of its own.

    is_blank: every image is replaced by its mean colour (zeros after normalisation), to see what the questions alone
    give away. Images go through the vision tower once; batches hold questions of similar length. ``advance`` is told
    how many questions were answered.
    """
    features = _encode_images(assistant, list(dict.fromkeys(q.image for q in questions)), batch_size, is_blank)
    prompts = [ChatSession.first_prompt(assistant, question.question) for question in questions]

    def images_of(chosen: Sequence[int]) -> Tensor:
        return torch.stack([features[questions[i].image] for i in chosen])

    return answer_prompts(assistant.model, prompts, images_of, assistant.stopping(options), batch_size, advance)


@torch.no_grad()
def _encode_images(assistant: Assistant, paths: Sequence[Path], batch_size: int, is_blank: bool) -> dict[Path, Tensor]:
    """Image file -> features [P, C'] of the frozen vision part."""
    model = assistant.model
    features: dict[Path, Tensor] = {}
    for start in range(0, len(paths), batch_size):
        chosen = paths[start : start + batch_size]
        pixels = torch.stack([assistant.image_processor(open_image(path)) for path in chosen])
        if is_blank:
            pixels = torch.zeros_like(pixels)
        with model.autocast():
            encoded = model.vision_features(pixels.to(model.device))
        features.update(zip(chosen, encoded, strict=True))
    return features
