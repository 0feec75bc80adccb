"""How likely a model finds every possible answer, instead of what it writes: nothing has to be read from text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.common.types import Encoded
from minigpt4.evaluation.questions import Question
from minigpt4.evaluation.ranking import target_batch

ANSWERS = "answers"
"""Field of a question's ``meta``: the texts that are compared."""


@dataclass(frozen=True)
class _Row:
    """One question followed by one of its answers."""

    question: int
    answer: int
    target: Sequence[int]


@torch.no_grad()
def answer_likelihoods(
    assistant: Assistant,
    questions: Sequence[Question],
    prompts: Sequence[Encoded],
    images_of: Callable[[Sequence[int]], Tensor],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[str]:
    """Log-likelihood per token of every text in ``meta['answers']`` and its end symbol, as a JSON list.

    Dividing by the tokens keeps long answers from losing. Answers of one question stand in one batch with one copy of
    its picture's features.
    """
    encoder = assistant.model.encoder
    rows = [
        _Row(number, answer, encoder.encode_answer(text))
        for number, question in sorted(enumerate(questions), key=lambda item: len(prompts[item[0]].ids))
        for answer, text in enumerate(question.meta[ANSWERS])
    ]
    found = [[0.0] * len(question.meta[ANSWERS]) for question in questions]
    left = [len(scores) for scores in found]
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        values = _per_token(assistant, chosen, questions, prompts, images_of)
        for row, value in zip(chosen, values, strict=True):
            found[row.question][row.answer] = round(value, 5)
            left[row.question] -= 1
        advance(sum(left[number] == 0 for number in {row.question for row in chosen}))
    return [json.dumps(scores) for scores in found]


def _per_token(
    assistant: Assistant,
    rows: Sequence[_Row],
    questions: Sequence[Question],
    prompts: Sequence[Encoded],
    images_of: Callable[[Sequence[int]], Tensor],
) -> list[float]:
    model = assistant.model
    numbers = list(dict.fromkeys(row.question for row in rows))
    first, count = {}, 0  # of every question's pictures among those of the batch
    for number in numbers:
        first[number] = count
        count += len(questions[number].images)
    places = [first[row.question] + i for row in rows for i in range(len(questions[row.question].images))]
    batch = target_batch(
        [prompts[row.question] for row in rows],
        [row.target for row in rows],
        images_of(numbers),
        model.encoder.tokenizer.pad_id,
    )
    batch = replace(batch, image_order=torch.tensor(places, dtype=torch.long)).to(model.device)
    sums = model(batch).sample_loss.tolist()
    return [-value / len(row.target) for row, value in zip(rows, sums, strict=True)]
