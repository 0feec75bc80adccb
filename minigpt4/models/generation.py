"""Answers: batched and streamed generation on top of transformers' ``generate``."""

from __future__ import annotations

import contextlib
import os.path
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from minigpt4.common.errors import ConfigError
from minigpt4.common.pictures import distinct
from minigpt4.common.schema import ModelConfig
from minigpt4.common.types import IMAGE_TOKEN, Encoded
from minigpt4.conversation.tokenizer import Tokenizer
from minigpt4.models.answer_text import StopOnRequest, StopOnText, TextStreamer, finished
from minigpt4.models.base_model import BaseModel
from minigpt4.models.decoding import MODES, Decoding
from minigpt4.models.prompt_cache import PromptCache, growing_cache, keeps_positions
from minigpt4.models.row_answers import Answer, EndRows, Rows
from minigpt4.models.row_sampling import RowSampling

# The penalty sees generated ids alone, as in MiniGPT-4; transformers says so at every answer.
warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")

_WORTH_SHARING = 16
"""A common start with fewer positions is computed for every prompt: another call of the model costs more."""


@dataclass(frozen=True)
class GenerateOptions:
    """Decoding options; the names are those of transformers.

    stop        texts that end an answer.
    stop_ids    ids that end an answer, besides the tokenizer's end of sequence and those of ``Encoder.stop_ids``.
    max_length  positions that a chat may take, answer included; None = the language model's own window.
    decoding    a name in ``decoding.MODES``; auto = compiled on a GPU once that pays, else dynamic.
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
    decoding: str = "auto"

    def __post_init__(self) -> None:
        if self.decoding not in MODES:
            raise ConfigError(f"decoding must be one of {', '.join(MODES)}; got '{self.decoding}'")
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

    def __init__(self, cfg: ModelConfig, device: torch.device, dtype: torch.dtype, reads_vision: bool = True) -> None:
        super().__init__(cfg, device, dtype, reads_vision)
        self._decoding = Decoding()

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
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Answers of ``prompts``. images: [N, 3, S, S] pixels or [N, P, C'] features of all prompts, in order.

        A picture that several prompts show is encoded once, and so is a start that all prompts share. Setting
        ``stopped`` from another thread ends the answers where they are. seeds: one per prompt; a sampled answer then
        depends on its seed alone, not on the batch. Not with beams.
        """
        if not prompts:
            return []
        options = self._with_ends(options)
        embeddings, mask, held = self._begun(prompts, images, options)
        watch = None if stopped is None else StopOnRequest(stopped.is_set)
        draw = None
        if seeds is not None and options.do_sample:
            assert options.num_beams == 1, "beams are not sampled row by row"
            limits = (options.temperature, options.top_k, options.top_p)
            draw = RowSampling(seeds, options.max_new_tokens, *limits, self.device)
            options = replace(options, do_sample=False)
        rows = self._run(embeddings, mask, options, held=held, watch=watch, draw=draw).tolist()  # [B, new]
        tokenizer = self.encoder.tokenizer
        return [finished(row, tokenizer, options.stop, options.stop_ids).text for row in rows]

    @torch.no_grad()
    def generate_rows(self, prompts: Sequence[Encoded], images: Tensor, options: GenerateOptions, rows: Rows) -> None:
        """As ``generate``, with one beam, but ``rows`` is told of every answer when it ends, and may end it early."""
        assert options.num_beams == 1, "beams have no rows of their own"
        options = self._with_ends(options)
        embeddings, mask, held = self._begun(prompts, images, options)
        tokenizer = self.encoder.tokenizer
        on_text = StopOnText(tokenizer, options.stop) if options.stop else None
        ends = {tokenizer.eos_id, *options.stop_ids}
        watch = EndRows(rows, ends, on_text, lambda ids: finished(ids, tokenizer, options.stop, options.stop_ids))
        self._run(embeddings, mask, replace(options, stop=()), held=held, watch=watch)

    def generate_stream(
        self, prompt: Encoded, images: Tensor, options: GenerateOptions, cache: PromptCache | None = None
    ) -> Generator[str, None, str]:
        """Pieces of one answer as they are generated; returns the whole answer, as ``generate`` gives it.

        Joined, the pieces are the answer, unless the model repeats a role marker in the middle of it. cache: positions
        that an earlier call has computed are not computed again; one beam only. Leaving early stops the generation.
        """
        answer = yield from self.stream_answer(prompt, images, options, cache)
        return answer.text

    @torch.no_grad()
    def stream_answer(
        self,
        prompt: Encoded,
        images: Tensor,
        options: GenerateOptions,
        cache: PromptCache | None = None,
        is_unwanted: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, Answer]:
        """As ``generate_stream``; returns the answer with its length and why it ended.

        ``is_unwanted`` is asked after every token, also while no piece comes; True stops the generation.
        """
        options = self._with_ends(options)
        images = images.to(self.device)
        embeddings, mask = self._left_padded([prompt], images)
        held = None
        if cache is not None and keeps_positions(self._lm):
            held = cache.take(prompt.ids, images, self.encoder.num_image_tokens)
        streamer = TextStreamer(self.encoder.tokenizer, options.stop, options.stop_ids)
        watch = StopOnRequest(lambda: streamer.stopped.is_set() or is_unwanted())
        failure: list[BaseException] = []

        def work() -> None:
            try:
                try:
                    self._run(embeddings, mask, options, streamer, held, watch)
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
        return finished(streamer.ids, self.encoder.tokenizer, options.stop, options.stop_ids)

    def _with_ends(self, options: GenerateOptions) -> GenerateOptions:
        """The options, which also stop at every id that ends this model's answers."""
        return replace(options, stop_ids=tuple(dict.fromkeys((*self.encoder.stop_ids, *options.stop_ids))))

    def _begun(
        self, prompts: Sequence[Encoded], images: Tensor, options: GenerateOptions
    ) -> tuple[Tensor, Tensor, Any]:
        """Embeddings [B, T, D], their mask [B, T], and keys and values of a start that all prompts share, or None."""
        shared = self._shared_start(prompts, images, options)
        embeddings, mask = self._left_padded(prompts, images, shared)
        return embeddings, mask, self._computed_once(embeddings, shared) if shared else None

    def _shared_start(self, prompts: Sequence[Encoded], images: Tensor, options: GenerateOptions) -> int:
        """Positions at the start of all prompts that are worth computing once: the same ids about the same pictures.

        0 where the language model could not go on from there with padding in between.
        """
        if len(prompts) == 1 or options.num_beams > 1 or not (self.keeps_samples_apart and keeps_positions(self._lm)):
            return 0
        window = getattr(self._lm.config, "sliding_window", None)
        if window and max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens > window:
            return 0  # padding would push positions out of it
        places = iter(distinct(list(images))[1])
        told = []
        for prompt in prompts:
            pictures = [-1 - next(places) for _ in range(prompt.num_images)]  # no id is negative
            shown = iter([number for number in pictures for _ in range(self.encoder.num_image_tokens)])
            told.append([next(shown) if i == IMAGE_TOKEN else i for i in prompt.ids[:-1]])  # one is left to compute
        shared = len(os.path.commonprefix(told))
        return shared if shared >= _WORTH_SHARING else 0

    def _computed_once(self, embeddings: Tensor, shared: int) -> Any:
        """embeddings [B, T, D] with one start in all rows -> its keys and values for every row."""
        held = growing_cache()
        with self._answering(), self.autocast():
            self._lm.get_decoder()(inputs_embeds=embeddings[:1, :shared], past_key_values=held, use_cache=True)
        held.batch_repeat_interleave(len(embeddings))
        return held

    def _left_padded(self, prompts: Sequence[Encoded], images: Tensor, shared: int = 0) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D], padded with zeros behind the ``shared`` first positions, and the mask [B, T].

        Positions follow the mask.
        """
        pictures, places = distinct(list(images))
        order = None
        if len(pictures) < len(places):
            images, order = torch.stack(pictures), torch.tensor(places, device=self.device)
        images = images.to(self.device)
        ids = torch.tensor([i for prompt in prompts for i in prompt.ids], device=self.device)[None]  # [1, sum]
        count = sum(prompt.ids.count(IMAGE_TOKEN) for prompt in prompts)
        with self.autocast():
            flat = self.embed(ids, images, count, order)[0]  # [sum, D]
        lengths = [len(prompt.ids) for prompt in prompts]
        longest = max(lengths)
        rows, mask = flat.new_zeros(len(prompts), longest, flat.shape[-1]), ids.new_zeros(len(prompts), longest)
        for row, (part, length) in enumerate(zip(torch.split(flat, lengths), lengths, strict=True)):
            rest = longest - length + shared
            rows[row, :shared], rows[row, rest:] = part[:shared], part[shared:]
            mask[row, :shared] = mask[row, rest:] = 1
        return rows, mask

    def _run(
        self,
        embeddings: Tensor,
        mask: Tensor,
        options: GenerateOptions,
        streamer: TextStreamer | None = None,
        held: Any = None,
        watch: StoppingCriteria | None = None,
        draw: RowSampling | None = None,
    ) -> Tensor:
        """embeddings [B, T, D], of which ``held`` keeps the first positions' keys and values -> new ids [B, new].

        ``watch`` may end rows besides the options; ``draw`` chooses the words of each.
        """
        lm, decoding = self._lm, self._decoding
        arguments = _arguments(options, self.encoder.tokenizer)
        criteria: list[StoppingCriteria] = []
        if options.stop:
            criteria.append(StopOnText(self.encoder.tokenizer, options.stop))
        if watch is not None:
            criteria.append(watch)
        if draw is not None:
            arguments["logits_processor"] = LogitsProcessorList([draw])
        mode, used = decoding.choose(options.decoding, lm, options.num_beams), held
        if mode != "dynamic":
            used = decoding.load(lm, held, len(embeddings), embeddings.shape[1] + options.max_new_tokens)
            arguments |= decoding.arguments(mode, self.device)
        if used is not None:
            arguments["past_key_values"] = used

        def work() -> Tensor:
            with _seeded(options.seed, self.device), self.autocast():
                ids: Tensor = lm.generate(
                    inputs_embeds=embeddings,
                    attention_mask=mask,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList(criteria),
                    synced_gpus=self.is_sharded,  # a rank whose answers are done goes on until all are
                    **arguments,
                )
            return ids

        with self._answering():
            ids = decoding.run(mode, work)
        decoding.steps += ids.shape[1]
        if held is not None and used is not held:
            decoding.unload(used, held)
        return ids

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Eval mode, and none of the advice in a language model's folder (penalties and the like)."""
        lm, was_training = self._lm, self.training
        advice = lm.generation_config
        self.eval()
        try:
            lm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
            yield
        finally:
            lm.generation_config = advice
            self.train(was_training)


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


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
