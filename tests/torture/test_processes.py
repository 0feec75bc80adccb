"""Processes that vanish or hang (loader workers, ranks), jobs side by side: one named cause, no wait without end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.resume_harness import Lab, Setup, assert_same_run, assert_whole, jobs, newest
from tests.torture.conftest import ALONE

TIMEOUT_S = 3


def _error(text: str) -> str:
    (line,) = [line for line in text.splitlines() if "error: " in line]
    return line


def test_a_loader_worker_that_is_killed_is_named_and_the_run_goes_on(lab: Lab, undisturbed: Path) -> None:
    folder, setup = lab.home / "worker", Setup(workers=2)
    line = _error(lab.start(folder, setup, crash="worker:3").failed())
    assert "error: a process that loads data is gone" in line and "run.num_workers" in line and "--resume auto" in line
    assert_whole(folder)
    attempt = lab.start(folder, setup)
    attempt.done()
    assert "resuming at window 2" in attempt.text() and len(jobs(folder)) == 1
    assert_same_run(newest(folder), undisturbed)


def test_a_budget_of_bad_records_that_is_reached_ends_the_run_and_a_larger_one_goes_on(
    lab: Lab, undisturbed: Path
) -> None:
    folder = lab.home / "budget"
    line = _error(lab.start(folder, ALONE, "datasets.faces.max_bad_fraction=0.01").failed())
    assert "dataset 'faces'" in line and "max_bad_fraction 0.01" in line and "5.png" in line
    assert_whole(folder)
    lab.start(folder, ALONE).done()
    assert_same_run(newest(folder), undisturbed)


def test_two_jobs_that_start_together_keep_apart(lab: Lab, undisturbed: Path) -> None:
    folder = lab.home / "together"
    attempts = [lab.start(folder, ALONE, resume=None) for _ in range(2)]
    for attempt in attempts:
        attempt.done()
    assert len(jobs(folder)) == 2
    for job in jobs(folder):
        assert_same_run(job, undisturbed)


@pytest.mark.parametrize("fault", ["gone", "hangs"])
def test_a_rank_that_is_lost_ends_the_others_in_time_by_name(lab: Lab, fault: str) -> None:
    folder, setup = lab.home / fault, Setup(2, options=(f"run.dist_timeout={TIMEOUT_S}",))
    attempt = lab.start(folder, setup, crash=f"{fault}:3")
    started = time.monotonic()
    line = _error(attempt.failed(0))
    assert time.monotonic() - started < TIMEOUT_S + 25  # with the start, and 5 s of listening for rank 1
    assert line.startswith("[rank 0] error: rank 0 lost contact: no answer from rank 1.")
    assert f"run.dist_timeout = {TIMEOUT_S} s" in line and "--resume auto" in line
    assert_whole(folder)


def test_an_error_of_rank_0_alone_does_not_leave_rank_1_waiting(lab: Lab) -> None:
    attempt = lab.start(lab.home / "full", Setup(2, options=(f"run.dist_timeout={TIMEOUT_S}",)), crash="full:2")
    text = attempt.failed(1)
    assert "[rank 1] error: rank 1 lost contact: " in text
    assert "[rank 0] error: cannot write" in text


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_timeout(lab: Lab) -> None:
    folder = lab.home / "absent"
    attempt = lab.start(folder, Setup(2, options=("run.dist_timeout=2",)))
    attempt.ranks[1].kill()
    line = _error(attempt.failed(0))
    assert line.startswith("[rank 0] error: the 2 ranks did not meet at file://") and line.endswith("no sign of rank 1")
    assert "within 2 s (run.dist_timeout)" in line
    assert not jobs(folder)
