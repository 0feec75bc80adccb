"""One model, many people: a line in which every question waits for its turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from minigpt4.common.errors import DataError


class Place:
    """Where one question stands; ``ahead`` is the number of questions before it."""

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def ahead(self) -> int:
        """Questions that are answered first; 0 = it is this one's turn."""
        return self._line.ahead(self)

    def wait(self, seconds: float) -> bool:
        """Whether it is this one's turn, after at most ``seconds``."""
        return self._line.wait(self, seconds)


class Line:
    """First come, first served. At most ``max_waiting`` wait behind the one that is served."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._places: list[Place] = []
        self._moved = threading.Condition()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place at the end of the line, given up when the block ends. Raises DataError when the line is full."""
        place = Place(self)
        with self._moved:
            if len(self._places) > self.max_waiting:
                raise DataError(f"{self.max_waiting} questions are waiting already. Try again in a minute.")
            self._places.append(place)
        try:
            yield place
        finally:
            with self._moved:
                self._places.remove(place)
                self._moved.notify_all()

    def ahead(self, place: Place) -> int:
        """Places before ``place``."""
        with self._moved:
            return self._places.index(place)

    def wait(self, place: Place, seconds: float) -> bool:
        """Whether ``place`` is the first one, after at most ``seconds``."""
        with self._moved:
            return self._moved.wait_for(lambda: self._places[0] is place, seconds)
