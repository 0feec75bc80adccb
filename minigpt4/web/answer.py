"""One answer on its way, in a thread of its own: it ends when asked to, or when nobody looks at it any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from minigpt4.web.line import Line

_POLL_SECONDS = 0.25


class _Ended(threading.Event):
    """Set by hand, or by itself once nobody has looked for ``patience`` seconds."""

    def __init__(self, patience: float) -> None:
        super().__init__()
        self.patience = patience
        self.seen = time.monotonic()

    def is_set(self) -> bool:
        return super().is_set() or time.monotonic() - self.seen > self.patience


class Answer:
    """Waits in the line, then collects the pieces of an answer. The page reads ``text``, ``ahead``, ``is_done``.

    ``pieces`` is called when it is this answer's turn, with the event that tells it to end. ``patience``: seconds
    without a look (``wait_for_news``) after which the answer is given up: the tab was closed, or the connection broke.
    """

    def __init__(self, pieces: Callable[[threading.Event], Iterator[str]], line: Line, patience: float = 20.0) -> None:
        self.text = ""
        self.ahead = 0
        self.is_done = self.is_stopped = False  # stopped: ended before its end
        self.failure: BaseException | None = None
        self._pieces, self._line = pieces, line
        self._ended = _Ended(patience)
        self._news = threading.Condition()
        self._version = self._told = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the answer where it is."""
        self._ended.set()

    def join(self, seconds: float | None = None) -> None:
        """Wait for the end; after ``stop`` that is a word more at most."""
        self._thread.join(seconds)

    def wait_for_news(self, seconds: float) -> bool:
        """Whether there is something new to show, after at most ``seconds``; also the sign that somebody looks."""
        self._ended.seen = time.monotonic()
        with self._news:
            is_new = self._news.wait_for(lambda: self._version != self._told, seconds)
            self._told = self._version
        return is_new

    def _run(self) -> None:
        try:
            with self._line.place() as place:
                while not self._ended.is_set() and not place.wait(_POLL_SECONDS):
                    self._tell("", place.ahead)
                if not self._ended.is_set():
                    self._tell("", 0)
                    for piece in self._pieces(self._ended):
                        self._tell(piece, 0)
        except BaseException as error:  # handed to the reader, never swallowed
            self.failure = error
        finally:
            with self._news:
                self.is_done, self.is_stopped = True, self._ended.is_set()
                self._version += 1
                self._news.notify_all()

    def _tell(self, piece: str, ahead: int) -> None:
        with self._news:
            if piece or ahead != self.ahead:
                self.text += piece
                self.ahead = ahead
                self._version += 1
                self._news.notify_all()
