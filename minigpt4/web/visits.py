"""Everything the page does, without the page: visits of browser tabs to one model."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import ChatSession
from minigpt4.common.errors import DataError
from minigpt4.conversation.grounding import read_grounded
from minigpt4.models.generation import GenerateOptions
from minigpt4.processors.box_drawing import save_boxes, shrunk
from minigpt4.web.answer import Answer
from minigpt4.web.limits import Limits
from minigpt4.web.line import Line
from minigpt4.web.tasks import has_task_tag, with_box

_PREVIEW_SIDE = 1024
_KEPT = 4
"""Conversations whose computed positions stay on the device; the others' are computed again when they go on."""
_MANY = 10_000


@dataclass(frozen=True)
class Message:
    """One line of the conversation as it is shown. role: user, assistant, or note (of the program itself)."""

    role: str
    text: str = ""
    picture: Path | None = None


class Visit:
    """One browser tab: its picture, its conversation, and what is shown of it."""

    def __init__(self, assistant: Assistant, folder: Path) -> None:
        self.assistant, self.folder = assistant, folder
        self.answer: Answer | None = None
        self.session = ChatSession(assistant)
        self.lock = threading.Lock()  # held while a picture is received: a question that follows it waits
        self.clear()

    def clear(self) -> None:
        """A new conversation without a picture. An answer on its way ends, and belongs to nothing any more."""
        if self.answer is not None:
            self.answer.stop()
        self.answer = None
        self.session.release()
        self.messages: list[Message] = []
        messages = self.messages
        self.session = ChatSession(self.assistant, lambda text: messages.append(Message("note", f"Note: {text}.")))
        self.preview: Image.Image | None = None
        self.pixels: Tensor | None = None  # [3, S, S] until the first question
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_answering(self) -> bool:
        """Whether an answer is on its way, or waits."""
        return self.answer is not None and not self.answer.is_done

    def show_boxes(self, role: str, text: str) -> None:
        """Add the picture with the boxes of ``text`` to what is shown, where there are both."""
        grounded = read_grounded(text)
        if self.preview is None or not grounded.has_boxes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"boxes_{len(self.messages):03d}_{time.monotonic_ns()}.png"
        save_boxes(self.preview, grounded.entities, path)
        self.messages.append(Message(role, picture=path))


class Visits:
    """All tabs that talk to one model. One answer is generated at a time; the others wait in a line."""

    def __init__(self, assistant: Assistant, folder: Path, limits: Limits, needs_picture: bool = False) -> None:
        self.assistant, self.folder, self.limits = assistant, folder, limits
        self.needs_picture = needs_picture
        self.line = Line(limits.max_waiting)
        self._visits: OrderedDict[str, Visit] = OrderedDict()  # the one used last stands last
        self._put_away: OrderedDict[str, None] = OrderedDict()
        self._kept: list[ChatSession] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def visit(self, key: str) -> Visit:
        """The visit of a tab; new ones begin empty, and put the longest unused away when there are too many."""
        with self._lock:
            if key not in self._visits:
                self._visits[key] = Visit(self.assistant, self.folder / f"visit_{next(self._numbers)}")
            self._visits.move_to_end(key)
            idle = [other for other, visit in self._visits.items() if other != key and not visit.is_answering]
            for other in idle[: max(0, len(self._visits) - self.limits.max_visits)]:
                self._visits.pop(other).clear()
                self._put_away[other] = None
            while len(self._put_away) > _MANY:
                self._put_away.popitem(last=False)
            return self._visits[key]

    def receive(self, key: str, path: str | Path) -> Image.Image:
        """A new picture, and with it a new conversation; returns it as it is shown.

        Raises DataError for a bad one; the conversation of before is gone then too.
        """
        visit = self.visit(key)
        with visit.lock:
            self.restart(key)
            picture = self.limits.open_upload(path)
            visit.pixels, visit.preview = self.assistant.image_processor(picture), shrunk(picture, _PREVIEW_SIDE)
        return visit.preview

    def ask(self, key: str, question: str, box: str, options: GenerateOptions) -> Generator[list[Message]]:
        """What is to be shown, again and again while the answer comes. Raises DataError for what cannot be asked.

        A question that fails leaves the conversation as it was before.
        """
        visit, text = self._checked(key, question, box)
        session, before = visit.session, len(visit.messages)
        visit.messages.append(Message("user", text))
        visit.show_boxes("user", text)
        answer = visit.answer = Answer(lambda ended: self._pieces(visit, session, text, options, ended), self.line)
        yield [*visit.messages, Message("assistant", "…")]
        while not answer.is_done:
            if answer.wait_for_news(0.5) and not answer.is_done and visit.session is session:
                yield [*visit.messages, Message("assistant", _progress(answer))]
                time.sleep(0.05)  # a page cannot show words faster than this, and every update costs
        if visit.session is not session:  # cleared meanwhile
            return
        if answer.failure is not None:
            del visit.messages[before:]
            raise answer.failure
        if answer.text or not answer.is_stopped:
            visit.messages.append(Message("assistant", answer.text))
            visit.show_boxes("assistant", answer.text)
        if answer.is_stopped:
            visit.messages.append(Message("note", "Stopped."))
        yield list(visit.messages)

    def stop(self, key: str) -> None:
        """End the answer of this tab where it is."""
        if (answer := self.visit(key).answer) is not None:
            answer.stop()

    def restart(self, key: str) -> None:
        """A new conversation without a picture."""
        self._put_away.pop(key, None)
        self.visit(key).clear()

    def leave(self, key: str) -> None:
        """The tab was closed: its answer ends, its picture and conversation are gone."""
        with self._lock:
            visit = self._visits.pop(key, None)
            self._put_away.pop(key, None)
        if visit is not None:
            visit.clear()

    def _checked(self, key: str, question: str, box: str) -> tuple[Visit, str]:
        text = self.limits.check_question(question)
        if key in self._put_away:
            del self._put_away[key]
            raise DataError("Others came, and this conversation was put away. Upload the picture again.")
        visit = self.visit(key)
        with visit.lock:
            has_picture = visit.preview is not None
        if visit.is_answering:
            raise DataError("An answer is still on its way. Wait for it, or stop it.")
        if not has_picture and (self.needs_picture or has_task_tag(text)):
            raise DataError("Upload a picture first.")
        return visit, with_box(text, box)

    def _pieces(
        self, visit: Visit, session: ChatSession, question: str, options: GenerateOptions, ended: threading.Event
    ) -> Iterator[str]:
        """Pieces of the answer; called when it is this visit's turn, so nobody else uses the model."""
        try:
            if visit.session is session and visit.pixels is not None:
                pixels, visit.pixels = visit.pixels, None
                session.set_image(pixels)
            yield from session.stream(question, options, ended)
        except torch.OutOfMemoryError as error:
            for other in (*self._kept, session):
                other.release()
            raise DataError("The GPU has no memory left for this answer. Ask again, or restart.") from error
        if visit.session is not session:  # cleared meanwhile
            session.release()
            return
        self._kept = [*(other for other in self._kept if other is not session), session]
        while len(self._kept) > _KEPT:
            self._kept.pop(0).release()


def _progress(answer: Answer) -> str:
    if answer.text:
        return answer.text
    if answer.ahead:
        return f"Waiting: {answer.ahead} {'question is' if answer.ahead == 1 else 'questions are'} answered first …"
    return "…"
