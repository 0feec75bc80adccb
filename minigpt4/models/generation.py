"""Answers: batched and streamed generation on top of transformers' ``generate``."""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from minigpt4.common.errors import ConfigError
from minigpt4.common.types import IMAGE_TOKEN, Encoded
from minigpt4.conversation.tokenizer import Tokenizer
from minigpt4.models.base_model import BaseModel
from minigpt4.models.prompt_cache import PromptCache, keeps_positions

# The penalty sees generated ids alone, as in MiniGPT-4; transformers says so at every answer.
warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")

ROLE_MARKERS = ("Assistant:", "[/INST]")
"""What a model may repeat before its answer; the answer stands behind the last one (MiniGPT-4's rule)."""


@dataclass(frozen=True)
class GenerateOptions:
    """Decoding options; the names are those of transformers.

    stop        texts that end an answer.
    stop_ids    ids that end an answer, besides the tokenizer's end of sequence and those of ``Encoder.stop_ids``.
    max_length  positions that a chat may take, answer included; None = the language model's own window.
    """

    max_new_tokens: int = 300
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50  # 0 = all words; 50 is what transformers gave the reference
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    max_length: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0), ("min_new_tokens", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be > 0 and <= 1, got {self.top_p}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if self.max_length is not None and self.max_length <= self.max_new_tokens:
            raise ConfigError(
                f"max_length {self.max_length} leaves no room for a question before {self.max_new_tokens} new tokens"
            )


class GenerationMixin(BaseModel):
    """``generate`` (many prompts, left padded) and ``generate_stream`` (one prompt, text as it comes)."""

    @property
    def context_window(self) -> int | None:
        """Positions the language model was made for; None where its configuration does not say."""
        window = getattr(self._lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if window is None else int(window)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Encoded],
        images: Tensor,
        options: GenerateOptions,
        stopped: threading.Event | None = None,
    ) -> list[str]:
        """Answers of ``prompts``. images: [N, 3, S, S] pixels or [N, P, C'] features of all prompts, in order.

        Setting ``stopped`` from another thread ends the answers where they are.
        """
        if not prompts:
            return []
        options = self._with_ends(options)
        embeddings, mask = self._left_padded(prompts, images)
        rows = self._run(embeddings, mask, options, stopped=stopped).tolist()  # [B, new]
        ends = {self.encoder.tokenizer.eos_id, *options.stop_ids}
        return [clean_answer(self.encoder.tokenizer.decode(_until(row, ends)), options.stop) for row in rows]

    @torch.no_grad()
    def generate_stream(
        self, prompt: Encoded, images: Tensor, options: GenerateOptions, cache: PromptCache | None = None
    ) -> Generator[str, None, str]:
        """Pieces of one answer as they are generated; returns the whole answer, as ``generate`` gives it.

        Joined, the pieces are the answer, unless the model repeats a role marker in the middle of it. cache: positions
        that an earlier call has computed are not computed again; one beam only. Leaving early stops the generation.
        """
        options = self._with_ends(options)
        images = images.to(self.device)
        embeddings, mask = self._left_padded([prompt], images)
        held = None
        if cache is not None and keeps_positions(self._lm):
            held = cache.take(prompt.ids, images, self.encoder.num_image_tokens)
        streamer = _TextStreamer(self.encoder.tokenizer, options)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                try:
                    self._run(embeddings, mask, options, streamer, held, streamer.stopped)
                finally:
                    streamer.end()
            except BaseException as error:  # handed to the reader below, never swallowed
                failure.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # also when the reader leaves early: no answer goes on in the background
            streamer.stopped.set()
            thread.join()
            if cache is not None and held is not None and not failure:
                cache.put_back(held, prompt.ids + streamer.ids, images)
        if failure:
            raise failure[0]
        return streamer.answer

    def _with_ends(self, options: GenerateOptions) -> GenerateOptions:
        """The options, which also stop at every id that ends this model's answers."""
        return replace(options, stop_ids=tuple(dict.fromkeys((*self.encoder.stop_ids, *options.stop_ids))))

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
        streamer: _TextStreamer | None = None,
        held: Any = None,
        stopped: threading.Event | None = None,
    ) -> Tensor:
        """embeddings [B, T, D], of which ``held`` keeps the first positions' keys and values -> new ids [B, new]."""
        arguments = _arguments(options, self.encoder.tokenizer)
        criteria: list[StoppingCriteria] = []
        if options.stop:
            criteria.append(_StopOnText(self.encoder.tokenizer, options.stop))
        if stopped is not None:
            criteria.append(_StopOnRequest(stopped))
        if held is not None:
            arguments["past_key_values"] = held
        lm, was_training = self._lm, self.training
        advice = lm.generation_config
        self.eval()
        try:
            # The folder of a language model may advise penalties and the like; answers follow the options alone.
            lm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
            with _seeded(options.seed, self.device), self.autocast():
                ids: Tensor = lm.generate(
                    inputs_embeds=embeddings,
                    attention_mask=mask,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList(criteria),
                    synced_gpus=self.is_sharded,  # a rank whose answers are done goes on until all are
                    **arguments,
                )
        finally:
            lm.generation_config = advice
            self.train(was_training)
        return ids


def _arguments(options: GenerateOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """The options as transformers' ``generate`` takes them."""
    arguments: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "num_beams": options.num_beams,
        "do_sample": options.do_sample,
        "repetition_penalty": options.repetition_penalty,
        "eos_token_id": list(dict.fromkeys([tokenizer.eos_id, *options.stop_ids])),
        "pad_token_id": tokenizer.pad_id,
        "use_cache": True,
    }
    if options.num_beams > 1:
        arguments["length_penalty"] = options.length_penalty
    if options.do_sample:
        arguments.update(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)
    if options.min_new_tokens:
        arguments["min_new_tokens"] = options.min_new_tokens
    return arguments


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first of ``ends``."""
    return next((ids[:position] for position, i in enumerate(ids) if i in ends), ids)


def clean_answer(text: str, stop: Sequence[str] = ()) -> str:
    """Cut at the first stop text, drop a repeated role marker and surrounding space (MiniGPT-4's rule)."""
    for marker in stop:
        text = text.split(marker)[0]
    for marker in ROLE_MARKERS:
        text = text.split(marker)[-1]
    return text.strip()


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
        self.window = max(len(text.encode()) for text in stop) + 2  # a token is a byte or more

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
    """Turns ids into text pieces; holds back what may still become a stop text, a role marker or half a character."""

    def __init__(self, tokenizer: Tokenizer, options: GenerateOptions) -> None:
        self.tokenizer, self.stop = tokenizer, options.stop
        self.ends = {tokenizer.eos_id, *options.stop_ids}
        self.held_back = (*options.stop, *ROLE_MARKERS)
        self.stopped = threading.Event()
        self.ids: list[int] = []
        self.pieces: queue.Queue[str | None] = queue.Queue()
        self.text = ""  # of ids[:read]
        self.read = self.anchor = 0
        self.shown = ""

    @property
    def answer(self) -> str:
        """The answer so far, cleaned."""
        return clean_answer(self.tokenizer.decode(_until(self.ids, self.ends)), self.stop)

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
