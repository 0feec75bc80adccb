"""SIGKILL at random moments, again and again: in windows, in saves, in starts. Every run ends to the last bit the same.

RESUME_SEED, RESUME_KILLS (kills per combination and round) and RESUME_MINUTES (rounds go on for so long) change it.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.resume_harness import WINDOWS, Kill, Lab, Setup, assert_same_run, assert_whole, newest
from tests.test_resume_proof import SEED, SETUPS, undisturbed

KILLS = int(os.environ.get("RESUME_KILLS", "12"))
MINUTES = float(os.environ.get("RESUME_MINUTES", "0"))


def killed_often(lab: Lab, folder: Path, setup: Setup, draw: Random, kills: int) -> tuple[list[Path], list[Kill]]:
    """Runs that were killed ``kills`` times in all, now and then while they started."""
    jobs: list[Path] = []
    fallen: list[Kill] = []
    while len(fallen) < kills:
        run, at = folder / str(len(jobs)), 0
        while len(fallen) < kills:
            attempt = lab.start(run, setup)
            if draw.random() < 0.2:
                kill = attempt.kill_after(None, draw.uniform(0, 1.5))
            else:
                kill = attempt.kill_after(draw.randint(at, at + 2), draw.uniform(0, 0.3))
            assert_whole(run)
            if not kill.is_running:
                break
            fallen.append(kill)
            at = min(kill.window, WINDOWS - 2)
        lab.start(run, setup).done()
        jobs.append(newest(run))
    return jobs, fallen


def _alone(lab: Lab, ranks: int, packing: str) -> Path:
    return undisturbed(lab, lab.home / f"alone_{ranks}_{packing}", Setup(ranks, 0, packing))


@pytest.mark.slow
def test_after_many_kills_every_bit_is_the_same(lab: Lab) -> None:
    end = time.monotonic() + 60 * MINUTES
    fallen: list[Kill] = []
    rounds = 0
    with ThreadPoolExecutor(2) as pool:
        kinds = sorted({(setup.ranks, setup.packing) for setup in SETUPS})
        expected = dict(zip(kinds, pool.map(lambda kind: _alone(lab, *kind), kinds), strict=True))
        while rounds == 0 or time.monotonic() < end:

            def story(setup: Setup, number: int = rounds) -> tuple[list[Path], list[Kill]]:
                folder = lab.home / f"often_{number}_{setup}".replace(" ", "_")
                return killed_often(lab, folder, setup, Random(f"{SEED}/{number}/{setup}"), KILLS)

            for setup, (finished, kills) in zip(SETUPS, pool.map(story, SETUPS), strict=True):
                fallen += kills
                for job in finished:
                    assert_same_run(job, expected[setup.ranks, setup.packing])
            rounds += 1
    in_save = sum(kill.is_in_save for kill in fallen)
    print(f"RESUME_SEED={SEED}: {len(fallen)} kills survived in {rounds} rounds, {in_save} of them in a save")
    assert len(fallen) == rounds * KILLS * len(SETUPS) and 0 < in_save < len(fallen)
