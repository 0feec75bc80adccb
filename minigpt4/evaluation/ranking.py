"""Multiple choice by likelihood: the candidate that the model finds likeliest after the question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.common.dist import DistContext
from minigpt4.common.types import IGNORE_INDEX, Batch, Encoded
from minigpt4.conversation.encoding import Encoder
from minigpt4.evaluation.engine import AnswerOptions, answer_all
from minigpt4.evaluation.questions import Answer, Question
from minigpt4.models.generation import GenerateOptions, GenerationMixin

_BATCH = 10
"""Where ``AnswerOptions`` has no ``batch_size``."""
_ABSENT = 9999.0
"""Score of a candidate that a shorter list does not have, as in the published evaluation."""


@dataclass(frozen=True)
class Ranked:
    """``choice``: index of the best candidate, -1 where ``error`` says why there is none."""

    choice: int
    losses: tuple[float, ...] = ()
    error: str = ""


def rank_all(
    assistant: Assistant, questions: Sequence[Question], out: Path | None, options: AnswerOptions, dist: DistContext
) -> list[Ranked]:
    """The best of every question's candidates (``meta['choices']``), on every rank, in the order of ``questions``.

    As ``answer_all``: with ``out`` a run that was cut off goes on. The answers in that file are the candidates' losses.
    Batches are those of the file's order, on any number of ranks and after a resume, and whoever asks one question of a
    batch again asks all of them: the score depends a little on what else is in the batch, see ``losses_of``.
    (Pictures are encoded in other batches after a resume, which is rounding alone.)
    """
    size = options.batch_size or _BATCH
    batch_of = {question.id: number // size for number, question in enumerate(questions)}

    def respond(
        assistant: Assistant,
        questions: Sequence[Question],
        prompts: Sequence[Encoded],
        images_of: Callable[[Sequence[int]], Tensor],
        batch_size: int,
        advance: Callable[[int], None],
    ) -> list[str]:
        texts = []
        for _, group in groupby(range(len(questions)), key=lambda number: batch_of[questions[number].id]):
            numbers = list(group)
            choices = [questions[number].meta["choices"] for number in numbers]
            losses = losses_of(assistant.model, [prompts[number] for number in numbers], images_of(numbers), choices)
            texts += [json.dumps(row[: len(own)].tolist()) for row, own in zip(losses, choices, strict=True)]
            advance(len(numbers))
        return texts

    candidates = json.dumps([question.meta["choices"] for question in questions])
    source = {
        **options.source,
        "batch_size": str(size),
        "candidates": hashlib.sha256(candidates.encode()).hexdigest()[:16],
    }
    ranking = replace(
        options, generation=GenerateOptions(max_new_tokens=1), batch_size=size, group=size, source=source,
        respond=respond,
    )  # fmt: skip
    return [_ranked(answer) for answer in answer_all(assistant, questions, out, ranking, dist)]


def _ranked(answer: Answer) -> Ranked:
    if answer.error:
        return Ranked(-1, error=answer.error)
    losses = tuple(json.loads(answer.text))
    return Ranked(min(range(len(losses)), key=losses.__getitem__), losses)


@torch.no_grad()
def losses_of(
    model: GenerationMixin, prompts: Sequence[Encoded], features: Tensor, choices: Sequence[Sequence[str]]
) -> Tensor:
    """Loss of every candidate after its prompt, [B, K]; candidates that a list lacks have 9999.

    features: of the prompts' pictures, [B, P, C']. The loss is MiniGPT-v2's: the sum over the candidate's tokens and
    its end symbol, divided by the positions of the longest prompt and the longest k-th candidate of the batch.
    """
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
