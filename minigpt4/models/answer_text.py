"""Text of an answer while it is generated: where it ends, what is cut from it, and its pieces as they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from minigpt4.conversation.tokenizer import Tokenizer
from minigpt4.models.row_answers import Answer

ROLE_MARKERS = ("Assistant:", "[/INST]")
"""What a model may repeat before its answer; the answer stands behind the last one (MiniGPT-4's rule)."""


def until(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first of ``ends``."""
    return next((ids[:position] for position, i in enumerate(ids) if i in ends), ids)


def finished(ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Sequence[int]) -> Answer:
    """The answer that ends with the last of ``ids``."""
    ends = {tokenizer.eos_id, *stop_ids}
    text = tokenizer.decode(until(list(ids), ends))
    is_finished = any(number in ends for number in ids) or any(marker in text for marker in stop)
    return Answer(clean_answer(text, stop), len(ids), is_finished)


def clean_answer(text: str, stop: Sequence[str] = ()) -> str:
    """Cut at the first stop text, drop a repeated role marker and surrounding space (MiniGPT-4's rule)."""
    for marker in stop:
        text = text.split(marker)[0]
    for marker in ROLE_MARKERS:
        text = text.split(marker)[-1]
    return text.strip()


class StopOnText(StoppingCriteria):
    """Ends each row on its own once a stop text is in its last tokens, however it was split into pieces."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.window = max(len(text.encode()) for text in stop) + 2  # a token is a byte or more

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids [B, new] -> done [B]."""
        tails = [self.tokenizer.decode(row) for row in input_ids[:, -self.window :].tolist()]
        return torch.tensor([any(s in tail for s in self.stop) for tail in tails], device=input_ids.device)


class StopOnRequest(StoppingCriteria):
    """Ends all rows once somebody asked for it."""

    def __init__(self, is_requested: Callable[[], bool]) -> None:
        self.is_requested = is_requested

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids [B, new] -> done [B]."""
        return torch.full((len(input_ids),), self.is_requested(), device=input_ids.device)


class TextStreamer(BaseStreamer):
    """Turns ids into text pieces; holds back what may still become a stop text, a role marker or half a character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Sequence[int]) -> None:
        self.tokenizer, self.stop, self.stop_ids = tokenizer, stop, stop_ids
        self.ends = {tokenizer.eos_id, *stop_ids}
        self.held_back = (*stop, *ROLE_MARKERS)
        self.stopped = threading.Event()
        self.ids: list[int] = []
        self.pieces: queue.Queue[str | None] = queue.Queue()
        self.text = ""  # of ids[:read]
        self.read = self.anchor = 0
        self.shown = ""

    @property
    def answer(self) -> str:
        """The answer so far, cleaned."""
        return finished(self.ids, self.tokenizer, self.stop, self.stop_ids).text

    def put(self, value: Tensor) -> None:
        """One more id (called by ``generate``; the prompt is given as embeddings and comes as an empty tensor)."""
        self.ids += [int(i) for i in value.flatten().tolist()]
        if len(self.ids) == self.read or self.ids[-1] in self.ends:
            return
        # Decoding all ids again would cost more for every token. Ids of the piece before tell how a piece is joined.
        window = self.tokenizer.decode(self.ids[self.anchor :])
        if window.endswith("\ufffd"):
            return
        self.text += window[len(self.tokenizer.decode(self.ids[self.anchor : self.read])) :]
        self.anchor, self.read = self.read, len(self.ids)
        text = clean_answer(self.text, self.stop)
        held = max((n for s in self.held_back for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if any(s in self.text for s in self.stop):
            held = 0  # the answer ends here, and what was shown of it stays
        self._show(text[: len(text) - held].rstrip())

    def end(self) -> None:
        """The answer is complete; the reader is released whatever happens."""
        try:
            self._show(self.answer)
        finally:
            self.pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.pieces.get()) is not None:
            yield piece

    def _show(self, text: str) -> None:
        if not text.startswith(self.shown):  # a role marker: the answer starts again behind it
            self.pieces.put("\n")
            self.shown = ""
        if len(text) > len(self.shown):
            self.pieces.put(text[len(self.shown) :])
            self.shown = text
