"""Answers of a batch that end one by one: each is told as soon as it ends, with its length and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    num_tokens   generated ids, the end token among them.
    is_finished  the model ended it; False: it reached its limit.
    """

    text: str
    num_tokens: int
    is_finished: bool


class Rows(Protocol):
    """What the caller of a batch says about its rows, and what it is told. Called from the generating thread."""

    def limit(self, row: int) -> int:
        """New tokens that this row may take."""

    def is_unwanted(self, row: int) -> bool:
        """Nobody waits for this row any more: it ends here, and is not told."""

    def tell(self, row: int, answer: Answer) -> None:
        """The answer of this row; the others may go on."""


class EndRows(StoppingCriteria):
    """Ends every row where its answer ends, and tells of it at once.

    ends: ids that end an answer. on_text: whether rows end in a stop text, [B, new] -> [B]; None where there is none.
    answer: ids of a whole answer -> what is told.
    """

    def __init__(
        self,
        rows: Rows,
        ends: set[int],
        on_text: Callable[[Tensor, Any], Tensor] | None,
        answer: Callable[[Sequence[int]], Answer],
    ) -> None:
        self.rows, self.ends, self.on_text, self.answer = rows, ends, on_text, answer
        self.is_over: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids [B, new] -> done [B]."""
        count, length = input_ids.shape
        self.is_over = self.is_over or [False] * count
        newest: list[int] = input_ids[:, -1].tolist()
        by_text = self.on_text(input_ids, scores).tolist() if self.on_text else [False] * count
        for row in range(count):
            if self.is_over[row]:
                continue
            if newest[row] in self.ends or by_text[row] or length >= self.rows.limit(row):
                self.is_over[row] = True
                self.rows.tell(row, self.answer(input_ids[row].tolist()))
            elif self.rows.is_unwanted(row):
                self.is_over[row] = True
        return torch.tensor(self.is_over, device=input_ids.device)
