"""The next window is on its way to the GPU while this one trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.types import Batch

Item = TypeVar("Item")
Copied = tuple[list[Batch], torch.cuda.Event | None]
"""A window, and what happens when it has arrived."""


def one_ahead(items: Iterator[Item], begin: Callable[[Item], Item]) -> Iterator[Item]:
    """``items``, each after ``begin`` was called with the one behind it.

    An error of the one behind is raised after this one was used, as it would be without looking ahead.
    """
    failure: MiniGPT4Error | None = None
    current = next(items, None)
    current = None if current is None else begin(current)
    while current is not None:
        try:
            following = next(items, None)
            following = None if following is None else begin(following)
        except MiniGPT4Error as error:
            following, failure = None, error
        yield current
        current = following
    if failure is not None:
        raise failure


def copied_ahead(windows: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Windows on ``device``; a GPU copies each, from pinned memory and as bytes, while the one before it trains."""
    if device.type != "cuda":
        yield from windows
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(window: Copied) -> Copied:
        with torch.cuda.stream(copies):
            return [batch.copied(device) for batch in window[0]], copies.record_event()

    on_host: Iterator[Copied] = ((window, None) for window in windows)
    for window, arrived in one_ahead(on_host, begin):
        training = torch.cuda.current_stream(device)
        if arrived is not None:
            training.wait_event(arrived)
        for batch in window:
            for tensor in batch.tensors():
                tensor.record_stream(training)  # or the copies' stream could use its memory again too early
        yield window
