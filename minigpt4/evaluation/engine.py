"""Many questions to one model: in batches, on all ranks, with answers on disk as they come."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.chat.prompts import encode_conversation, turn_text
from minigpt4.chat.session import open_image
from minigpt4.common.bar import progress
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.types import IMAGE_TAG, Encoded
from minigpt4.evaluation.ledger import Ledger
from minigpt4.evaluation.questions import Answer, Question, check_ids
from minigpt4.models.generation import GenerateOptions
from minigpt4.tasks.answering import answer_prompts, stacked

log = logging.getLogger(__name__)

T = TypeVar("T")
_WINDOW = 4
"""Batches whose questions are sorted by length together, and that are on disk together."""
_READERS = 4
"""Threads that read the pictures of the next window meanwhile."""
_AUTO_BATCH = {"cuda": 32, "cpu": 16}
"""Where ``batch_size`` None starts; on a GPU it is halved as often as memory runs out."""


class Respond(Protocol):
    """Another way to answer than generating: what it returns for each question is kept as the answer's text."""

    def __call__(
        self,
        assistant: Assistant,
        questions: Sequence[Question],
        prompts: Sequence[Encoded],
        images_of: Callable[[Sequence[int]], Tensor],
        batch_size: int,
        advance: Callable[[int], None],
    ) -> list[str]:
        """images_of: numbers of questions -> features of their pictures. ``advance`` is told of questions answered."""


@dataclass(frozen=True)
class AnswerOptions:
    """How questions are answered.

    batch_size  None = as many as fit. source: what the answers depend on besides ``generation``: checkpoint, ...
    respond     how encoded questions are answered; None = by generating text.
    group       so many questions, in their order, stay together: on one rank, and when one of them is asked again.
    """

    generation: GenerateOptions = field(default_factory=GenerateOptions)
    batch_size: int | None = None
    source: Mapping[str, str] = field(default_factory=dict)
    is_overwriting: bool = False
    title: str = "answers"
    respond: Respond | None = None
    group: int = 1

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {self.batch_size}")
        if self.generation.do_sample and self.generation.num_beams > 1:
            raise ConfigError("answers are either sampled (temperature above 0) or searched for with beams, not both")

    def based_on(self, source: Mapping[str, str]) -> AnswerOptions:
        """The same options for the model that ``source`` tells of."""
        return replace(self, source=source)

    def ledger(self, out: Path, questions: Sequence[Question]) -> Ledger:
        """The answers in ``out``; its ``check`` tells before any model is loaded whether they can go on."""
        settings = {name: str(value) for name, value in asdict(self.generation).items()}
        return Ledger(out, questions, {**self.source, **settings}, self.is_overwriting)


def answer_all(
    assistant: Assistant, questions: Sequence[Question], out: Path | None, options: AnswerOptions, dist: DistContext
) -> list[Answer]:
    """Answers in the order of ``questions``, on every rank; with ``out`` also in that file, as ``Ledger`` says.

    A run that was cut off goes on where it was, on any number of ranks; questions that failed are asked again. But for
    rounding, a greedy answer does not depend on the batch, and a sampled one on (seed, id) alone; without a seed it is
    0. What is wrong with one question or picture becomes its ``error``. Raises DataError for answers of another run in
    ``out``.
    """
    check_ids(questions)
    ledger = None if out is None else options.ledger(out, questions)
    known = {} if ledger is None else ledger.open(dist)
    groups = [questions[start : start + options.group] for start in range(0, len(questions), options.group)]
    pending = [group for group in groups if any(question.id not in known for question in group)]
    count = sum(map(len, pending))
    if known:
        log.info("%s: %d of %d are there, going on", options.title, len(known), len(questions))
    mine = [question for group in pending[dist.rank :: dist.world_size] for question in group]
    new: list[Answer] = []
    work = _Work(assistant, options, mine)
    try:
        with progress(options.title, "answers", count, dist.is_main) as advance:
            for answers in work.windows(lambda done: advance(min(done * dist.world_size, count))):
                new += answers
                if ledger is not None:
                    ledger.append(answers)
    finally:
        if ledger is not None:
            ledger.close()
    found = {**known, **{answer.question.id: answer for share in dist.gather_objects(new) for answer in share}}
    result = [found[question.id] for question in questions]
    if ledger is not None:
        ledger.finish(result, dist)
    if failed := [answer for answer in result if answer.error]:
        log.warning("%s: %d without an answer, the first: %s", options.title, len(failed), failed[0].error)
    return result


def seed_of(question: Question, seed: int | None) -> int:
    """The seed of one sampled answer, whatever batch and rank it is on."""
    return int.from_bytes(hashlib.sha256(f"{seed or 0}/{question.id}".encode()).digest()[:7])


def prompt_of(assistant: Assistant, question: Question, max_new_tokens: int) -> Encoded:
    """Ids of a question. Raises DataError for one that cannot be asked."""
    if question.is_rendered:
        if question.prompt.count(IMAGE_TAG) != len(question.images):
            raise DataError(f"{len(question.images)} pictures for {question.prompt.count(IMAGE_TAG)} {IMAGE_TAG}")
        prompt = assistant.model.encoder.encode_text(question.prompt)
    else:
        turn = turn_text(assistant, [*[None] * len(question.images), question.prompt])
        prompt = encode_conversation(assistant, [], turn)
    window = assistant.model.context_window
    if window is not None and len(prompt.ids) + max_new_tokens > window:
        taken = f"the question takes {len(prompt.ids)} positions, an answer up to {max_new_tokens} (max_new_tokens)"
        raise DataError(f"{taken}, but the window has {window}")
    return prompt


class Pictures:
    """Pixels of picture files, read by threads ahead of their use. Use as a context manager."""

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant
        self._pool = ThreadPoolExecutor(_READERS)
        self._read: dict[str, Future[Tensor]] = {}

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def expect(self, paths: Sequence[str]) -> None:
        """Start to read these."""
        for path in paths:
            if path not in self._read:
                self._read[path] = self._pool.submit(self._load, path)

    def pixels(self, path: str) -> Tensor:
        """One expected picture, [3, S, S]. Raises DataError."""
        return self._read[path].result()

    def forget(self, paths: Sequence[str]) -> None:
        """These are not needed any more."""
        for path in paths:
            self._read.pop(path, None)

    def _load(self, path: str) -> Tensor:
        return self._assistant.image_processor(open_image(path))


class _Work:
    """One rank's questions, answered window by window."""

    def __init__(self, assistant: Assistant, options: AnswerOptions, questions: Sequence[Question]) -> None:
        self._assistant, self._options, self._questions = assistant, options, questions
        self._generation = assistant.stopping(options.generation)
        self._batch = options.batch_size or _AUTO_BATCH[assistant.model.device.type]
        self._features: dict[str, Tensor] = {}  # of the pictures of the window, [P, C']
        self._done = 0

    def windows(self, advance: Callable[[int], None]) -> Iterator[list[Answer]]:
        """Answers of a few batches at a time, in the order of the questions."""
        start, windows = 0, list[Sequence[Question]]()
        while start < len(self._questions):
            windows.append(self._questions[start : start + _WINDOW * self._batch])
            start += len(windows[-1])
        with Pictures(self._assistant) as pictures:
            for number, window in enumerate(windows):
                for ahead in windows[number : number + 2]:
                    pictures.expect(_paths(ahead))
                answers = self._window(window, pictures, advance)
                needed = set(_paths(windows[number + 1])) if number + 1 < len(windows) else set()
                pictures.forget([path for path in _paths(window) if path not in needed])
                self._done += len(window)
                advance(self._done)
                yield answers

    def _window(
        self, questions: Sequence[Question], pictures: Pictures, advance: Callable[[int], None]
    ) -> list[Answer]:
        prompts: dict[int, Encoded] = {}
        answers = [Answer(question, "") for question in questions]
        for number, question in enumerate(questions):
            try:
                for path in question.images:
                    pictures.pixels(path)
                prompts[number] = prompt_of(self._assistant, question, self._options.generation.max_new_tokens)
            except DataError as error:
                answers[number] = Answer(question, "", str(error))
        if not prompts:
            return answers
        numbers = list(prompts)
        paths = _paths([questions[number] for number in numbers])
        self._features = {path: self._features[path] for path in paths if path in self._features}
        self._fitting(lambda size: self._encode(paths, pictures, size))
        texts = self._fitting(lambda size: self._answer([questions[i] for i in numbers], prompts, size, advance))
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = Answer(questions[number], text)
        return answers

    def _answer(
        self, questions: Sequence[Question], prompts: Mapping[int, Encoded], size: int, advance: Callable[[int], None]
    ) -> list[str]:
        count = 0

        def answered(number: int) -> None:
            nonlocal count
            count += number
            advance(self._done + count)

        def images_of(chosen: Sequence[int]) -> Tensor:
            return stacked([self._features[path] for i in chosen for path in questions[i].images])

        model, encoded = self._assistant.model, list(prompts.values())
        if self._options.respond is not None:
            return self._options.respond(self._assistant, questions, encoded, images_of, size, answered)
        drawn = self._generation.do_sample
        seeds = [seed_of(question, self._generation.seed) for question in questions] if drawn else None
        return answer_prompts(model, encoded, images_of, self._generation, size, answered, seeds)

    @torch.no_grad()
    def _encode(self, paths: Sequence[str], pictures: Pictures, size: int) -> None:
        """Every picture goes through the vision tower once, however many questions are about it."""
        model, missing = self._assistant.model, [path for path in paths if path not in self._features]
        for start in range(0, len(missing), size):
            chosen = missing[start : start + size]
            with model.autocast():
                encoded = model.vision_features(torch.stack(list(map(pictures.pixels, chosen))).to(model.device))
            self._features.update(zip(chosen, encoded, strict=True))

    def _fitting(self, action: Callable[[int], T]) -> T:
        """``action`` with the batch size, which is halved while memory runs out. Raises ConfigError."""
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                return action(self._batch)
            if self._batch == 1 or self._options.batch_size is not None:
                hint = "use a smaller batch_size, or auto" if self._batch > 1 else "shorten answers or use int8 weights"
                raise ConfigError(f"the GPU's memory does not hold a batch of {self._batch}; {hint}")
            self._batch //= 2
            torch.cuda.empty_cache()
            log.warning("out of GPU memory: going on with batches of %d", self._batch)


def _paths(questions: Sequence[Question]) -> list[str]:
    """Pictures of the questions, each once."""
    return list(dict.fromkeys(path for question in questions for path in question.images))
