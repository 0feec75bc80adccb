"""Whole runs with ``model.cache_vision``: the same losses, a second run computes nothing, kills lose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.resume_harness import Lab, Setup, assert_same_run, checks, newest, open_lab, rows

CACHED = "model.cache_vision=disk"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("lab")) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a cache."""
    return trained(lab, tmp_path_factory.mktemp("plain"), Setup())[0]


@pytest.fixture(scope="module")
def cached(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a cache: its job and its cache."""
    folder = tmp_path_factory.mktemp("cached")
    job, text = trained(lab, folder, Setup(), CACHED)
    assert "17 pictures of 4.1 kB, 17 to compute = 69.6 kB" in text and "16 of them computed now" in text
    return job, folder / "vision_cache"


def trained(lab: Lab, folder: Path, setup: Setup, *options: str) -> tuple[Path, str]:
    attempt = lab.start(folder, setup, *options, resume=None)
    attempt.done()
    return newest(folder), attempt.text()


def assert_close(job: Path, expected: Path) -> None:
    """The same windows; losses to 2e-5, which is the noise of another batch of the vision tower, grown over the run."""
    mine, theirs = [*rows(job), *checks(job)], [*rows(expected), *checks(expected)]
    assert len(mine) == len(theirs) > 8
    for one, other in zip(mine, theirs, strict=True):
        assert {key: value for key, value in one.items() if isinstance(value, int)} == {
            key: value for key, value in other.items() if isinstance(value, int)
        }
        for key in ("loss", "val_loss"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=2e-5)


def test_losses_equal_those_without_a_cache(cached: tuple[Path, Path], plain: Path) -> None:
    assert_close(cached[0], plain)


def test_a_second_run_computes_nothing_and_repeats_the_first_to_the_last_bit(
    lab: Lab, cached: tuple[Path, Path], tmp_path: Path
) -> None:
    job, text = trained(lab, tmp_path, Setup(workers=2), CACHED, f"run.cache_root={cached[1]}")
    assert "1 to compute" in text and "0 of them computed" in text  # the broken picture is tried again
    assert_same_run(job, cached[0])
