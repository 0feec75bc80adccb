"""One thread that answers waiting requests: in order of arrival, equal ones together in one batch.

A request takes a *place* when it arrives, and gives it back when its answer starts; there are only so many. Streamed
answers run alone. All else that could be asked for together with the oldest request runs with it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.models.row_answers import Answer
from minigpt4.serve.errors import ApiError
from minigpt4.serve.prompts import Prepared
from minigpt4.tasks.answering import stacked

log = logging.getLogger(__name__)

Event = str | Answer | ApiError
"""A piece of a streamed answer; the whole answer, or why there is none, as the last event of a job."""


@dataclass(frozen=True)
class Limits:
    """max_batch: rows of a batch. max_queue: waiting requests. batch_wait, timeout, grace: seconds.

    batch_wait  how long a request waits for others to share its batch.
    timeout     of a request, from its arrival to its last token.
    grace       that running answers get when the server stops.
    """

    max_batch: int = 8
    max_queue: int = 64
    batch_wait: float = 0.01
    timeout: float = 300.0
    grace: float = 20.0


@dataclass
class Place:
    """A place in the queue."""

    is_taken: bool = True


@dataclass
class Times:
    """Seconds of the monotonic clock; 0 = not yet."""

    queued: float = 0.0
    started: float = 0.0
    first: float = 0.0


class Job:
    """One request on its way to an answer. ``deliver`` is called from the scheduler's thread.

    ``deadline``: of the monotonic clock. ``place`` is given back when the answer starts.
    """

    def __init__(
        self, prepared: Prepared, is_streaming: bool, deadline: float, place: Place, deliver: Callable[[Event], None]
    ) -> None:
        self.prepared, self.is_streaming, self.deadline, self.place = prepared, is_streaming, deadline, place
        self._deliver = deliver
        self.times = Times()
        self.batch_size = 0
        self.is_cancelled = self.is_over = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.is_cancelled = True

    def is_unwanted(self) -> bool:
        """Cancelled, answered, or too late."""
        return self.is_cancelled or self.is_over or time.monotonic() > self.deadline

    def tell(self, event: Event) -> None:
        """Hand an event to whoever waits; nothing follows the last one."""
        if self.is_over:
            return
        self.times.first = self.times.first or time.monotonic()
        self.is_over = not isinstance(event, str)
        self._deliver(event)

    def fits_with(self, other: Job) -> bool:
        """Whether both may share a batch: not streamed, decoded alike, and not drawn from a seed of their own."""
        mine, theirs = _decoding(self.prepared.options), _decoding(other.prepared.options)
        return not self.is_streaming and not other.is_streaming and mine == theirs and mine.seed is None


def _decoding(options: GenerateOptions) -> GenerateOptions:
    """The options without the length, which every row has of its own."""
    return replace(options, max_new_tokens=1)


class _Rows:
    """The jobs of a batch, as ``generate_rows`` asks for them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def limit(self, row: int) -> int:
        return self.jobs[row].prepared.options.max_new_tokens

    def is_unwanted(self, row: int) -> bool:
        return self.jobs[row].is_unwanted()

    def tell(self, row: int, answer: Answer) -> None:
        self.jobs[row].tell(answer)


class Scheduler:
    """The queue and the thread. ``on_failure`` is called, from the thread, when it cannot go on."""

    def __init__(self, model: GenerationMixin, limits: Limits, on_failure: Callable[[], None] = lambda: None) -> None:
        self.model, self.limits, self._on_failure = model, limits, on_failure
        self._changed = threading.Condition()
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._places = 0
        self._is_draining = self._is_stopped = self.has_failed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def state(self) -> str:
        """ready, stopping or failed."""
        return "failed" if self.has_failed else "stopping" if self._is_draining else "ready"

    @property
    def num_waiting(self) -> int:
        """Requests that arrived and whose answer has not started."""
        return self._places

    @property
    def num_running(self) -> int:
        """Answers that are being generated."""
        return len(self._running)

    def waiting(self) -> list[Job]:
        """Jobs in the queue, the oldest first."""
        with self._changed:
            return list(self._queue)

    def take_place(self) -> Place:
        """A place for a request that arrives. Raises ApiError: 429 when all are taken, 503 when the server stops."""
        with self._changed:
            if self._is_draining:
                raise _stopping()
            if self._places >= self.limits.max_queue:
                raise ApiError(
                    429, f"{self._places} requests are waiting, no more are taken", code="queue_full", retry_after=1
                )
            self._places += 1
        return Place()

    def give_back(self, place: Place) -> None:
        """One request less is waiting; a second call for the same place does nothing."""
        with self._changed:
            self._places -= place.is_taken
            place.is_taken = False

    def submit(self, job: Job) -> None:
        """Queue ``job``. Raises ApiError 503 when the server is stopping."""
        with self._changed:
            if self._is_draining:
                raise _stopping()
            job.times.queued = time.monotonic()
            self._queue.append(job)
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more requests; what waits is told 503, what runs goes on."""
        with self._changed:
            self._is_draining = True
            waiting, self._queue = self._queue, []
            self._changed.notify_all()
        for job in waiting:
            job.tell(_stopping())

    def stop(self) -> None:
        """End running answers too."""
        self.drain()
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            running = list(self._running)
        for job in running:
            job.tell(_stopping())

    def join(self) -> None:
        """Wait until the thread has ended, after ``stop``."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while batch := self._next():
                self._answer(batch)
                self._running = []
        except BaseException:  # told to everybody who waits, and the server stops
            log.exception("the model failed for good")
            self.has_failed = True
            for job in self._running:
                job.tell(ApiError(500, "the model failed, the server stops", code="model_failed"))
            self.drain()
            self._on_failure()

    def _next(self) -> list[Job]:
        """Jobs that start now, their places given back; empty at the end."""
        with self._changed:
            while not self._is_stopped:
                self._queue = [job for job in self._queue if not job.is_unwanted()]
                if not self._queue:
                    self._changed.wait()
                    continue
                oldest = self._queue[0]
                batch = [oldest, *(job for job in self._queue[1:] if oldest.fits_with(job))][: self.limits.max_batch]
                wait = oldest.times.queued + self.limits.batch_wait - time.monotonic()
                may_grow = len(batch) < self.limits.max_batch and oldest.fits_with(oldest)
                if wait <= 0 or not may_grow:
                    self._queue = [job for job in self._queue if job not in batch]
                    return self._started(batch)
                self._changed.wait(wait)
        return []

    def _started(self, batch: list[Job]) -> list[Job]:
        now = time.monotonic()
        self._running = batch
        for job in batch:
            job.times.started, job.batch_size = now, len(batch)
            self.give_back(job.place)
        return batch

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answers of ``jobs``. A batch that fails is asked again in halves: one request must not spoil the others."""
        try:
            if jobs[0].is_streaming:
                self._stream(jobs[0])
            else:
                prompts = [job.prepared.prompt for job in jobs]
                images = stacked([image for job in jobs for image in job.prepared.images])
                longest = max(job.prepared.options.max_new_tokens for job in jobs)
                options = replace(jobs[0].prepared.options, max_new_tokens=longest)
                self.model.generate_rows(prompts, images, options, _Rows(jobs))
        except (RuntimeError, ValueError, LookupError, TypeError, MiniGPT4Error) as error:
            self._recover(error)
            left = [job for job in jobs if not job.is_unwanted()]
            if len(jobs) == 1:
                log.exception("a request failed")
                jobs[0].tell(_failure(error))
                return
            log.warning("a batch of %d failed (%s); its requests are asked again", len(jobs), type(error).__name__)
            for half in (left[: len(left) // 2], left[len(left) // 2 :]):
                if half:
                    self._answer(half)

    def _recover(self, error: Exception) -> None:
        """Give memory back. Raises where the GPU itself is lost: then nothing more can be computed in this process."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()

    def _stream(self, job: Job) -> None:
        wish = job.prepared
        pieces = self.model.stream_answer(wish.prompt, stacked(wish.images), wish.options, is_unwanted=job.is_unwanted)
        with contextlib.closing(pieces):
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as finished:
                    if not job.is_unwanted():
                        job.tell(finished.value)
                    return
                job.tell(piece)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", retry_after=5)


def _failure(error: Exception) -> ApiError:
    if isinstance(error, torch.OutOfMemoryError):
        return ApiError(500, "the GPU has no memory for this request: fewer pictures or tokens", code="out_of_memory")
    return ApiError(500, "the model failed on this request; the server's log has the reason", code="model_failed")
