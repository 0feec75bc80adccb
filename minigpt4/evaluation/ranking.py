"""Multiple choice by likelihood: the candidate that the model finds likeliest after the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import open_image
from minigpt4.common.bar import progress
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import DataError
from minigpt4.common.types import IGNORE_INDEX, Batch, Encoded
from minigpt4.conversation.encoding import Encoder
from minigpt4.evaluation.engine import prompt_of
from minigpt4.evaluation.questions import Question
from minigpt4.models.generation import GenerationMixin

_ABSENT = 9999.0
"""Score of a candidate that a shorter list does not have, as in the published evaluation."""


@dataclass(frozen=True)
class Ranked:
    """``choice``: index of the best candidate, -1 where ``error`` says why there is none."""

    choice: int
    losses: tuple[float, ...] = ()
    error: str = ""


def rank_all(
    assistant: Assistant, questions: Sequence[Question], batch_size: int, dist: DistContext, title: str = "ranking"
) -> list[Ranked]:
    """The best of every question's candidates (``meta['choices']``), on every rank, in the order of ``questions``.

    Batches are those of the file's order: the score depends a little on what else is in the batch, see ``losses_of``.
    """
    starts = range(0, len(questions), batch_size)
    own: dict[int, list[Ranked]] = {}
    with progress(title, "questions", len(questions), dist.is_main) as advance:
        for number, start in enumerate(starts[dist.rank :: dist.world_size], start=1):
            own[start] = _rank_batch(assistant, questions[start : start + batch_size])
            advance(min(number * batch_size * dist.world_size, len(questions)))
    found: dict[int, list[Ranked]] = {}
    for share in dist.gather_objects(own):
        found.update(share)
    return [ranked for start in starts for ranked in found[start]]


def _rank_batch(assistant: Assistant, questions: Sequence[Question]) -> list[Ranked]:
    prompts, pixels, numbers = list[Encoded](), list[Tensor](), list[int]()
    result = [Ranked(-1) for _ in questions]
    for number, question in enumerate(questions):
        try:
            pictures = [assistant.image_processor(open_image(path)) for path in question.images]
            prompts.append(prompt_of(assistant, question, max_new_tokens=0))
        except DataError as error:
            result[number] = Ranked(-1, error=str(error))
            continue
        pixels += pictures
        numbers.append(number)
    if not numbers:
        return result
    choices = [questions[number].meta["choices"] for number in numbers]
    losses = losses_of(assistant.model, prompts, torch.stack(pixels), choices)  # [B, K]
    for number, row, own in zip(numbers, losses, choices, strict=True):
        result[number] = Ranked(int(row.argmin()), tuple(row[: len(own)].tolist()))
    return result


@torch.no_grad()
def losses_of(
    model: GenerationMixin, prompts: Sequence[Encoded], images: Tensor, choices: Sequence[Sequence[str]]
) -> Tensor:
    """Loss of every candidate after its prompt, [B, K]; candidates that a list lacks have 9999.

    images: pixels [B, 3, S, S] of the prompts. The loss is MiniGPT-v2's: the sum over the candidate's tokens and its
    end symbol, divided by the positions of the longest prompt and the longest k-th candidate of the batch.
    """
    with model.autocast():
        features = model.vision_features(images.to(model.device))  # [B, P, C']
    width = max(map(len, choices))
    losses = torch.full((len(prompts), width), _ABSENT)
    encoder, longest = model.encoder, max(len(prompt.ids) for prompt in prompts)
    for column in range(width):
        rows = [row for row, own in enumerate(choices) if column < len(own)]
        targets = [_target(encoder, choices[row][column]) for row in rows]
        batch = target_batch([prompts[row] for row in rows], targets, features[rows], encoder.tokenizer.pad_id)
        sums = model(batch.to(model.device)).sample_loss.cpu()
        # BOS is part of our prompts; the positions that predict are all but one
        losses[rows, column] = sums / (longest - 1 + max(map(len, targets)))
    return losses


def _target(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer.encode(text + encoder.end_sym)[: encoder.max_txt_len]


def target_batch(prompts: Sequence[Encoded], targets: Sequence[Sequence[int]], features: Tensor, pad_id: int) -> Batch:
    """Prompts with their targets, padded at the right end; only the targets are supervised."""
    rows = [[*prompt.ids, *target] for prompt, target in zip(prompts, targets, strict=True)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        positions[number, : len(row)] = torch.arange(len(row))
        labels[number, len(row) - len(target) : len(row)] = torch.tensor(target)
    return Batch(ids, positions, labels, features, tuple(map(len, rows)), sum(map(len, targets)))
