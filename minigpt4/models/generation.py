"""Answers: batched and streamed generation on top of transformers' ``generate``."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from minigpt4.common.types import IMAGE_TOKEN, Encoded
from minigpt4.conversation.tokenizer import Tokenizer
from minigpt4.models.base_model import BaseModel


@dataclass(frozen=True)
class GenerateOptions:
    """Decoding options; the names are those of transformers. ``stop``: texts that end an answer."""

    max_new_tokens: int = 300
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None


class GenerationMixin(BaseModel):
    """``generate`` (many prompts, left padded) and ``generate_stream`` (one prompt, text as it comes)."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Encoded], images: Tensor, options: GenerateOptions) -> list[str]:
        """Answers of ``prompts``. images: [N, 3, S, S] pixels or [N, P, C'] features of all prompts, in order."""
        if not prompts:
            return []
        embeddings, mask = self._left_padded(prompts, images)
        ids = self._run(embeddings, mask, options, None)  # [B, new]
        return [clean_answer(self.encoder.tokenizer.decode(row), options.stop) for row in self._until_end(ids)]

    @torch.no_grad()
    def generate_stream(self, prompt: Encoded, images: Tensor, options: GenerateOptions) -> Iterator[str]:
        """Pieces of one answer as they are generated; joined they are the answer of ``generate``."""
        streamer, stopped = _TextStreamer(self.encoder.tokenizer, options.stop), threading.Event()
        embeddings, mask = self._left_padded([prompt], images)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self._run(embeddings, mask, options, streamer, stopped)
            except BaseException as error:  # handed to the reader below, never swallowed
                failure.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also when the reader leaves early: no answer goes on in the background
            stopped.set()
            thread.join()
        if failure:
            raise failure[0]

    def _left_padded(self, prompts: Sequence[Encoded], images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D] with zeros on the left, and the mask [B, T]; positions follow the mask."""
        images = images.to(self.device)
        ids = torch.tensor([i for prompt in prompts for i in prompt.ids], device=self.device)[None]  # [1, sum]
        count = sum(prompt.ids.count(IMAGE_TOKEN) for prompt in prompts)
        with self.autocast():
            flat = self.embed(ids, images, count)[0]  # [sum, D]
        lengths = [len(prompt.ids) for prompt in prompts]
        longest = max(lengths)
        rows, mask = flat.new_zeros(len(prompts), longest, flat.shape[-1]), ids.new_zeros(len(prompts), longest)
        for row, (part, length) in enumerate(zip(torch.split(flat, lengths), lengths, strict=True)):
            rows[row, longest - length :] = part
            mask[row, longest - length :] = 1
        return rows, mask

    def _run(
        self,
        embeddings: Tensor,
        mask: Tensor,
        options: GenerateOptions,
        streamer: Any,
        stopped: threading.Event | None = None,
    ) -> Tensor:
        tokenizer = self.encoder.tokenizer
        arguments: dict[str, Any] = {
            "max_new_tokens": options.max_new_tokens,
            "num_beams": options.num_beams,
            "do_sample": options.do_sample,
            "repetition_penalty": options.repetition_penalty,
            "length_penalty": options.length_penalty,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "use_cache": True,
        }
        if options.do_sample:
            arguments.update(temperature=options.temperature, top_p=options.top_p)
        if options.min_new_tokens:
            arguments["min_new_tokens"] = options.min_new_tokens
        criteria: list[StoppingCriteria] = [_StopOnText(tokenizer, options.stop)] if options.stop else []
        if stopped is not None:
            criteria.append(_StopOnRequest(stopped))
        arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
        was_training = self.training
        self.eval()
        try:
            with _seeded(options.seed, self.device), self.autocast():
                ids: Tensor = self._lm.generate(
                    inputs_embeds=embeddings, attention_mask=mask, streamer=streamer, **arguments
                )
        finally:
            self.train(was_training)
        return ids

    def _until_end(self, ids: Tensor) -> list[list[int]]:
        end = self.encoder.tokenizer.eos_id
        rows = ids.tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]


def clean_answer(text: str, stop: Sequence[str] = ()) -> str:
    """Cut at the first stop text, drop a repeated role marker and surrounding space (MiniGPT-4's rule)."""
    for marker in stop:
        text = text.split(marker)[0]
    return text.split("Assistant:")[-1].split("[/INST]")[-1].strip()


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _StopOnText(StoppingCriteria):
    """Ends each row on its own once a stop text is in its last tokens, however it was split into pieces."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.window = max(len(text) for text in stop) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids [B, new] -> done [B]."""
        tails = [self.tokenizer.decode(row) for row in input_ids[:, -self.window :].tolist()]
        return torch.tensor([any(s in tail for s in self.stop) for tail in tails], device=input_ids.device)


class _StopOnRequest(StoppingCriteria):
    """Ends all rows once somebody asked for it."""

    def __init__(self, requested: threading.Event) -> None:
        self.requested = requested

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids [B, new] -> done [B]."""
        return torch.full((len(input_ids),), self.requested.is_set(), device=input_ids.device)


class _TextStreamer(BaseStreamer):
    """Turns ids into text pieces; holds back what may still become a stop text or half a character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.shown = ""
        self.pieces: queue.Queue[str | None] = queue.Queue()

    def put(self, value: Tensor) -> None:
        """One more id (called by ``generate``; the prompt is given as embeddings and comes as an empty tensor)."""
        self.ids += [int(i) for i in value.flatten().tolist()]
        text = self._text()
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if not text.endswith("\ufffd"):
            self._show(text[: len(text) - held].rstrip())

    def end(self) -> None:
        """The answer is complete."""
        self._show(self._text())
        self.pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.pieces.get()) is not None:
            yield piece

    def _text(self) -> str:
        ids = self.ids[: self.ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in self.ids else self.ids
        return clean_answer(self.tokenizer.decode(ids), self.stop)

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self.pieces.put(text[len(self.shown) :])
            self.shown = text
