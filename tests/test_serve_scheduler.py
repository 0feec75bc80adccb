"""What runs together, in which order, and what one bad request does to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from minigpt4.common.types import Encoded
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.row_answers import Answer, Rows
from minigpt4.serve.errors import ApiError
from minigpt4.serve.prompts import Prepared
from minigpt4.serve.scheduler import Event, Job, Limits, Place, Scheduler
from tests.serve_parts import picture, tiny_assistant

QUESTIONS = ("what is this?", "why?", "is the mouth open?", "who else is in the picture?", "hello")
COLOURS = ("red", "blue", "green", "black", "yellow")


def prepared(number: int, **options: Any) -> Prepared:
    """A question about a picture (every third is about none), and how it is answered."""
    assistant = tiny_assistant()
    num_images = 0 if number % 3 == 2 else 1
    text = "<Img><ImageHere></Img> " * num_images + QUESTIONS[number % 5] + " "
    images = (assistant.image_processor(picture(COLOURS[number % 5])),)[:num_images]
    wish = GenerateOptions(**{"max_new_tokens": 5 + number, **options})
    return Prepared(assistant.model.encoder.encode_prompt([], text), images, assistant.stopping(wish))


@dataclass
class Asked:
    """A job and what it was told."""

    prepared: Prepared
    is_streaming: bool = False
    seconds: float = 60
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_done = threading.Event()
        deadline = time.monotonic() + self.seconds
        self.job = Job(self.prepared, self.is_streaming, deadline, Place(is_taken=False), self._note)

    def _note(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, str):
            self.is_done.set()

    @property
    def last(self) -> Event:
        assert self.is_done.wait(60), "no answer"
        return self.events[-1]


def answered(jobs: Sequence[Asked], model: Any = None, **limits: Any) -> Scheduler:
    """All jobs in the queue before the scheduler starts, then answered."""
    scheduler = Scheduler(model or tiny_assistant().model, Limits(**limits))
    for asked in jobs:
        scheduler.submit(asked.job)
    scheduler.start()
    for asked in jobs:
        assert asked.last
    scheduler.stop()
    scheduler.join()
    return scheduler


def alone(wish: Prepared) -> str:
    """The answer of the model to one prompt."""
    images = torch.stack(wish.images) if wish.images else torch.zeros(0, 3, 1, 1)
    return tiny_assistant().model.generate([wish.prompt], images, wish.options)[0]


def test_every_answer_of_a_batch_is_the_answer_asked_for_alone() -> None:
    jobs = [Asked(prepared(number)) for number in range(5)]
    answered(jobs)
    assert [asked.job.batch_size for asked in jobs] == [5] * 5
    texts = [asked.last.text for asked in jobs if isinstance(asked.last, Answer)]
    assert texts == [alone(asked.prepared) for asked in jobs]
    assert len(set(texts)) == 5  # else a mix-up would not show
    assert [asked.last.num_tokens for asked in jobs if isinstance(asked.last, Answer)] == [5, 6, 7, 8, 9]


def test_a_short_answer_does_not_wait_for_the_long_ones_of_its_batch() -> None:
    jobs = [Asked(prepared(0, max_new_tokens=30)), Asked(prepared(1, max_new_tokens=2))]
    told: list[bool] = []
    jobs[1].job._deliver = lambda event: (told.append(jobs[0].job.is_over), jobs[1]._note(event))[1]  # type: ignore[func-returns-value]
    answered(jobs)
    assert told == [False] and jobs[0].job.batch_size == 2


def test_only_equal_decoding_shares_a_batch_and_a_seed_or_a_stream_runs_alone() -> None:
    greedy = [Asked(prepared(0)), Asked(prepared(1)), Asked(prepared(2, stop=("###",)))]
    sampled = {"do_sample": True, "temperature": 0.7}
    others = [Asked(prepared(0, **sampled)), Asked(prepared(1, **sampled)), Asked(prepared(0, seed=1, **sampled))]
    streamed = Asked(prepared(3), is_streaming=True)
    answered([greedy[0], streamed, *greedy[1:], *others])
    assert [asked.job.batch_size for asked in (*greedy, *others, streamed)] == [2, 2, 1, 2, 2, 1, 1]
    assert "".join(piece for piece in streamed.events if isinstance(piece, str)) == alone(streamed.prepared)


def test_answers_start_in_order_of_arrival() -> None:
    jobs = [Asked(prepared(number, max_new_tokens=2), is_streaming=number in (0, 2)) for number in range(4)]
    answered(jobs, max_batch=2)
    starts = [asked.job.times.started for asked in jobs]
    # 3 fits into the batch of 1 and does not let 2 wait longer
    assert starts[0] < starts[1] == starts[3] < starts[2]


def test_a_cancelled_or_late_request_is_not_asked_and_ends_its_row() -> None:
    late, cancelled, fine = Asked(prepared(0), seconds=-1), Asked(prepared(1)), Asked(prepared(2))
    cancelled.job.cancel()
    scheduler = Scheduler(tiny_assistant().model, Limits())
    for asked in (late, cancelled, fine):
        scheduler.submit(asked.job)
    scheduler.start()
    assert isinstance(fine.last, Answer) and fine.job.batch_size == 1
    endless = Asked(prepared(0, max_new_tokens=400))
    scheduler.submit(endless.job)
    while not endless.job.times.started:
        time.sleep(0.001)
    endless.job.cancel()
    after = Asked(prepared(1))
    scheduler.submit(after.job)
    assert isinstance(after.last, Answer) and endless.events == []
    scheduler.stop()
    scheduler.join()


class Spoilt:
    """The tiny model, which fails on one question."""

    def __init__(self, poison: Encoded, error: BaseException) -> None:
        self.model, self.poison, self.error = tiny_assistant().model, poison, error
        self.device = self.model.device
        self.asked: list[int] = []

    def generate_rows(self, prompts: Sequence[Encoded], images: Any, options: GenerateOptions, rows: Rows) -> None:
        self.asked.append(len(prompts))
        if self.poison in prompts:
            raise self.error
        self.model.generate_rows(prompts, images, options, rows)


def test_a_request_that_fails_does_not_spoil_its_batch() -> None:
    jobs = [Asked(prepared(number)) for number in range(4)]
    model = Spoilt(jobs[2].prepared.prompt, RuntimeError("no"))
    assert answered(jobs, model).state == "stopping"
    assert model.asked == [4, 2, 2, 1, 1]
    failed = jobs.pop(2).last
    assert isinstance(failed, ApiError) and (failed.status, failed.code) == (500, "model_failed")
    assert [asked.last.text for asked in jobs if isinstance(asked.last, Answer)] == [
        alone(asked.prepared) for asked in jobs
    ]


def test_a_model_that_cannot_go_on_is_told_to_everybody() -> None:
    jobs = [Asked(prepared(0)), Asked(prepared(1, stop=("#",)))]
    scheduler = answered(jobs, Spoilt(jobs[0].prepared.prompt, MemoryError("gone")))
    assert scheduler.state == "failed"
    assert [asked.last.status for asked in jobs if isinstance(asked.last, ApiError)] == [500, 503]
    with pytest.raises(ApiError, match="stopping"):
        scheduler.take_place()


def test_the_options_of_a_batch_are_those_of_its_requests_but_for_the_length() -> None:
    wish = prepared(0, repetition_penalty=1.5)
    other = replace(wish, options=replace(wish.options, max_new_tokens=9))
    assert Asked(wish).job.fits_with(Asked(other).job)
    assert not Asked(wish).job.fits_with(Asked(prepared(0)).job)
