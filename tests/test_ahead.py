"""The next window is begun before this one is used, and its errors wait for their turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minigpt4.common.errors import DataError
from minigpt4.common.types import Batch
from minigpt4.runners.ahead import copied_ahead, one_ahead


def test_each_is_used_after_the_one_behind_it_was_begun() -> None:
    events: list[str] = []

    def begin(item: str) -> str:
        events.append(f"begin {item}")
        return item

    for item in one_ahead(iter("abc"), begin):
        events.append(f"use {item}")
    assert events == ["begin a", "begin b", "use a", "begin c", "use b", "use c"]
    assert list(one_ahead(iter(""), begin)) == []


def test_what_is_wrong_with_the_next_one_is_told_after_this_one_was_used() -> None:
    def items() -> Iterator[str]:
        yield "a"
        yield "b"
        raise DataError("broken")

    used: list[str] = []
    with pytest.raises(DataError, match="broken"):
        for item in one_ahead(items(), lambda item: item):
            used.append(item)
    assert used == ["a", "b"]


def windows(count: int) -> list[list[Batch]]:
    def batch(number: int) -> Batch:
        ids = torch.full((1, 3), number)
        return Batch(
            input_ids=ids, position_ids=ids, labels=ids, images=torch.full((1, 3, 2, 2), number, dtype=torch.uint8),
            lengths=(3,), num_target_tokens=3, image_norm=torch.ones(2, 3, 1, 1),
        )  # fmt: skip

    return [[batch(2 * number), batch(2 * number + 1)] for number in range(count)]


def test_on_a_cpu_windows_come_as_they_are() -> None:
    given = windows(3)
    assert list(copied_ahead(iter(given), torch.device("cpu"))) == given


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_window_arrives_whole() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    given = [[batch.pin_memory() for batch in window] for window in windows(20)]
    for ours, expected in zip(copied_ahead(iter(given), device), windows(20), strict=True):
        for one, other in zip(ours, expected, strict=True):
            assert one.images.device == device and one.images.dtype == torch.uint8
            assert torch.equal(one.to(device).images.cpu(), other.to(torch.device("cpu")).images)
