"""Killed at any moment, a run of the real classes ends as if nothing had happened, to the last bit."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from minigpt4.common.checkpoint import find_last, read_checkpoint, settle_links
from minigpt4.datasets.sampler import WindowSampler
from minigpt4.runners.changes import name_differences
from tests.engine_parts import TASK, Bench
from tests.resume_children import die_in_saves, make_job_dir, save_step
from tests.resume_harness import (
    SAVE_WINDOWS,
    WINDOWS,
    Lab,
    Setup,
    assert_equal,
    assert_same_run,
    assert_whole,
    checks,
    newest,
    open_lab,
    rows,
)

SETUPS = [Setup(ranks, workers, packing) for ranks in (1, 2) for packing in ("padded", "packed") for workers in (0, 2)]
SEED = int(os.environ.get("RESUME_SEED", "20261"))
# The schedule counts micro-batches per rank, of which two ranks need half as many: any other than a constant rate
# differs with the number of ranks by construction, and so do the draws of dropout.
STEADY = ("model.lora_dropout=0", "run.init_lr=1e-3", "run.min_lr=1e-3", "run.warmup_steps=0")
TWO_RANKS = Setup(2, options=STEADY)
ONE_RANK = Setup(
    1, options=(*STEADY, "run.accum_grad_iters=4", f"run.iters_per_epoch={2 * WINDOWS}", "run.save_every=8")
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("lab")) as opened:
        yield opened


class Stories:
    """Runs in the background, two at a time; a test waits for the one it is about."""

    def __init__(self, lab: Lab, pool: ThreadPoolExecutor) -> None:
        self._lab, self._pool = lab, pool
        self._futures: dict[str, Future[Any]] = {}

    def begin(self, name: str, story: Callable[..., Any], *arguments: Any) -> None:
        self._futures[name] = self._pool.submit(story, self._lab, self._lab.home / name.replace(" ", "_"), *arguments)

    def result(self, name: str) -> Any:
        return self._futures[name].result()


def undisturbed(lab: Lab, folder: Path, setup: Setup) -> Path:
    lab.start(folder, setup).done()
    return newest(folder)


def killed_once(lab: Lab, folder: Path, setup: Setup, draw: Random) -> Path:
    """A kill at a random moment after the first checkpoint, then ``auto`` until the end."""
    for number in range(3):
        run = folder / str(number)
        kill = lab.start(run, setup).kill_after(draw.randint(SAVE_WINDOWS + 1, WINDOWS - 3), draw.uniform(0, 0.15))
        assert_whole(run)
        if kill.is_running:
            lab.start(run, setup).done()
            return newest(run)
    raise AssertionError("the runs are faster than the kills")


def killed_at_every_place(lab: Lab, folder: Path) -> tuple[Path, list[int]]:
    """Kills in the first save, in the middle of a window, between windows and in a later save."""
    setup = Setup(2, 0, "packed")
    for crash in ("save:2", "row:4", "after:5", "save:6", "after:6"):
        lab.start(folder, setup, crash=crash).crashed()
        assert_whole(folder)
    lab.start(folder, setup).done()
    events = (json.loads(line) for line in (newest(folder) / "log.txt").read_text().splitlines())
    return newest(folder), [row["window"] for row in events if row.get("event") == "resumed"]


def killed_between_windows(lab: Lab, folder: Path, setup: Setup) -> Path:
    lab.start(folder, setup, crash="after:5").crashed()
    lab.start(folder, setup).done()
    return newest(folder)


def spread_anew(lab: Lab, folder: Path, before: Setup, after: Setup) -> tuple[Path, str]:
    """Killed on some ranks, resumed on others; what the second attempt printed."""
    lab.start(folder, before).kill_after(3, 0.1)
    attempt = lab.start(folder, after)
    attempt.done()
    return newest(folder), attempt.text()


def started_from_weights(lab: Lab, folder: Path, source: Path) -> tuple[Path, str]:
    """A new job with the weights of ``source`` and a learning rate of 0."""
    rates = ("run.init_lr=0", "run.min_lr=0", "run.warmup_lr=0")
    attempt = lab.start(folder, Setup(), f"model.init_from={source}", *rates)
    attempt.done()
    return newest(folder), attempt.text()


def damaged(lab: Lab, folder: Path, source: Path) -> tuple[Path, str, str]:
    """A finished run whose last checkpoint is cut short, resumed."""
    copy = _copied(source, folder)
    broken = find_last(copy)
    assert broken is not None
    os.truncate(broken.path / "model.safetensors", 1000)
    attempt = lab.start(folder, Setup())
    attempt.done()
    return copy, broken.path.name, attempt.text()


def finished(lab: Lab, folder: Path, source: Path) -> tuple[dict[Path, int], dict[Path, int], str]:
    """Times of a finished run's files before and after another start."""
    copy = _copied(source, folder)
    before = {path: path.lstat().st_mtime_ns for path in copy.parent.rglob("*")}
    attempt = lab.start(folder, Setup())
    attempt.done()
    return before, {path: path.lstat().st_mtime_ns for path in copy.parent.rglob("*")}, attempt.text()


def killed_in_saves(lab: Lab, folder: Path) -> list[Path]:
    """Copies of a job, one per file operation of a save that a kill came in front of; the last save ran to its end."""
    before = folder / "before"
    for step in (1, 2, 3):
        save_step(before, step, is_best=step == 1)
    # step 4 was written once and damaged, and an older kill left a draft
    shutil.copytree(before / "checkpoints/step_3", before / "checkpoints/step_4")
    (before / "checkpoints/step_4/config.yaml").unlink()
    (before / "checkpoints/.writing_step_4_1").mkdir()
    process = lab.process(die_in_saves, before, folder / "after")
    process.join()
    assert process.exitcode == 0
    return sorted((folder / "after").iterdir(), key=lambda path: int(path.name))


def _copied(job: Path, folder: Path) -> Path:
    copy = folder / job.parent.name / job.name
    shutil.copytree(job, copy, symlinks=True)
    return copy


@pytest.fixture(scope="module")
def stories(lab: Lab) -> Iterator[Stories]:
    with ThreadPoolExecutor(2) as pool:
        told = Stories(lab, pool)
        for ranks, packing in itertools.product((1, 2), ("padded", "packed")):
            told.begin(f"alone {ranks} {packing}", undisturbed, Setup(ranks, 0, packing))
        for setup in SETUPS:
            told.begin(f"{setup}", killed_once, setup, Random(f"{SEED}/{setup}"))
        told.begin("every place", killed_at_every_place)
        told.begin("killed_in_saves", killed_in_saves)
        told.begin("alone steady", undisturbed, ONE_RANK)
        told.begin("2 to 1", spread_anew, TWO_RANKS, ONE_RANK)
        told.begin("1 to 2", spread_anew, ONE_RANK, TWO_RANKS)
        source = told.result("alone 1 padded")
        for story in (started_from_weights, damaged, finished):
            told.begin(story.__name__, story, source)
        yield told


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_after_a_kill_at_a_random_moment_every_bit_is_the_same(stories: Stories, setup: Setup) -> None:
    print(f"RESUME_SEED={SEED}")
    job = stories.result(str(setup))
    assert json.loads((job / "manifest.json").read_text())["start"] == "resumed"
    assert_same_run(job, stories.result(f"alone {setup.ranks} {setup.packing}"))


def test_kills_in_a_window_between_windows_and_in_a_save_change_no_bit(stories: Stories) -> None:
    job, resumed_at = stories.result("every place")
    assert_same_run(job, stories.result("alone 2 packed"))
    assert resumed_at == [2, 4, 4, 6]


def test_a_rehearsal_leaves_nothing_behind(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    before = bench.model.trainable_state()
    TASK.rehearse(bench.training, bench.batch(0, 1))
    assert_equal(bench.model.trainable_state(), before)
    assert all(parameter.grad is None for parameter in bench.training.parameters)
    assert not bench.training.optimizer.state


@pytest.mark.slow
def test_three_ranks_sum_in_the_same_order_after_a_resume(stories: Stories) -> None:
    stories.begin("alone three", undisturbed, Setup(3, 0, "packed"))
    stories.begin("three", killed_between_windows, Setup(3, 0, "packed"))
    assert_same_run(stories.result("three"), stories.result("alone three"))


@pytest.mark.slow
def test_a_balanced_order_goes_on_where_it_was_killed(stories: Stories) -> None:
    setup = Setup(2, 2, "packed", ("datasets.faces.balance.by=kind",))
    stories.begin("alone balanced", undisturbed, setup)
    stories.begin("balanced", killed_between_windows, setup)
    assert_same_run(stories.result("balanced"), stories.result("alone balanced"))
    losses = [row["loss"] for row in rows(stories.result("alone balanced"))]
    assert losses != [row["loss"] for row in rows(stories.result("alone 2 packed"))]


def test_some_windows_of_the_proof_have_no_image_on_one_rank_alone() -> None:
    def is_text_only(rank: int, window: int) -> bool:
        sampler = WindowSampler([12, 7], [2, 1], [2, 3], 2, 2, rank, 42)
        return all(key.dataset == 1 for keys in sampler.window(window) for key in keys)

    assert any(is_text_only(0, window) != is_text_only(1, window) for window in range(WINDOWS))


def test_ranks_and_accumulation_that_change_together_are_no_difference() -> None:
    before = {"world size": 2, "run.accum_grad_iters": 4, "run.seed": 1}
    assert name_differences(before, {**before, "world size": 4, "run.accum_grad_iters": 2}) == []
    (line,) = name_differences(before, {**before, "world size": 4})
    assert line.startswith("micro-batches per window (run.accum_grad_iters x ranks): 8 in the checkpoint, 16 now")
    assert len(name_differences(before, {**before, "world size": 1, "run.seed": 2})) == 2
    assert name_differences(before, {**before, "balance": {}}) == []
    (line,) = name_differences(before, {**before, "balance": {"faces": {"by": "label", "temperature": 0.0}}})
    assert line.startswith("balance: {} in the checkpoint, {'faces'")


@pytest.mark.parametrize("change", ["2 to 1", "1 to 2"])
def test_another_number_of_ranks_in_the_middle_changes_no_loss(stories: Stories, change: str) -> None:
    job, output = stories.result(change)
    losses = {row["window"]: row["loss"] for row in rows(job)}
    expected = {row["window"]: row["loss"] for row in rows(stories.result("alone steady"))}
    assert list(losses) == list(expected) == list(range(1, WINDOWS + 1))
    assert losses == pytest.approx(expected, abs=1e-6, rel=0)
    assert "resuming at window" in output and "losses will differ" not in output


def test_initial_weights_start_a_new_job_and_bring_nothing_else(stories: Stories) -> None:
    job, output = stories.result("started_from_weights")
    source = stories.result("alone 1 padded")
    assert [row["window"] for row in rows(job)] == list(range(1, WINDOWS + 1))
    # nothing was learned at rate 0: these are the weights the job began with
    checkpoint = read_checkpoint(job)
    assert_equal(checkpoint.load_weights(), read_checkpoint(source).load_weights())
    moments, state = checkpoint.load_resume()
    assert {float(values["step"]) for values in moments.values()} == {float(WINDOWS)} and state["window"] == WINDOWS
    manifest = json.loads((job / "manifest.json").read_text())
    assert manifest["start"] == "new" and manifest["weights_from"] == str(source)
    assert "resumed_from" not in manifest
    assert f"new job at window 0 with the weights of model.ckpt {source}" in output and "resuming" not in output


def test_a_resumed_job_says_so_in_its_manifest(stories: Stories) -> None:
    job, _ = stories.result("every place")
    manifest = json.loads((job / "manifest.json").read_text())
    assert manifest["start"] == "resumed" and "weights_from" not in manifest
    assert manifest["resumed_from"] == str(job / "checkpoints" / "step_6") and manifest["resumed_at_window"] == 6


def test_a_damaged_last_checkpoint_makes_auto_fall_back_and_say_so(stories: Stories) -> None:
    job, broken, output = stories.result("damaged")
    assert f"{broken}': incomplete, model.safetensors has 1000 bytes" in output
    assert f"resuming at window {WINDOWS - 2} of {WINDOWS}" in output
    assert_same_run(job, stories.result("alone 1 padded"))


def test_a_finished_run_changes_no_file(stories: Stories) -> None:
    before, after, output = stories.result("finished")
    assert f"nothing left to train: {WINDOWS} of {WINDOWS}" in output
    assert before == after


def test_a_first_start_with_auto_says_that_it_begins(stories: Stories) -> None:
    job = stories.result("alone 1 padded")
    assert "resume auto: no checkpoint" in (job.parents[1] / "out_0_0.txt").read_text()
    manifest = json.loads((job / "manifest.json").read_text())
    assert manifest["start"] == "new"
    # what the proof says it covers: validation, and a record that is passed over
    assert [check["window"] for check in checks(job)] == [4, 8]
    assert manifest["bad_records"]["faces"]["count"] == 1


def test_jobs_of_one_second_in_several_processes_get_folders_of_their_own(lab: Lab) -> None:
    root, start_at = lab.home / "one second", int(time.time()) + 2.1
    processes = [lab.process(make_job_dir, root, start_at) for _ in range(6)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    jobs = sorted((root / "tiny").iterdir())
    assert len(jobs) == 6 and all((job / "mine").is_file() for job in jobs)
    assert len({job.name[:15] for job in jobs}) == 1  # or else the test proves nothing


def test_a_kill_in_front_of_any_file_operation_of_a_save_leaves_whole_checkpoints(
    stories: Stories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    found_steps = []
    for job in stories.result("killed_in_saves"):
        for path in job.glob("checkpoints/step_*"):
            if path.name != "step_4" or (path / "config.yaml").is_file():
                read_checkpoint(path)
        found = find_last(job)
        assert found is not None, job
        found_steps.append(found.step)
        settle_links(found)  # what a resume does
        assert os.readlink(job / "checkpoints/last") == found.path.name
        assert os.readlink(job / "checkpoints/best") == ("step_4" if found.step == 4 else "step_1"), job
        assert read_checkpoint(job / "checkpoints/best").can_resume
        save_step(job, 5)
        names = sorted(path.name for path in (job / "checkpoints").iterdir())
        kept = ["step_4", "step_5"] if found.step == 4 else ["step_1", "step_3", "step_5"]
        assert names == ["best", "last", *kept], job
    assert len(found_steps) > 60 and found_steps == sorted(found_steps) and {3, 4} == set(found_steps)


def test_no_loader_worker_outlives_the_ranks_that_were_killed(stories: Stories, lab: Lab) -> None:
    for setup in SETUPS:
        stories.result(str(setup))
    end = time.monotonic() + 15  # a worker looks after its parent every 5 seconds
    while lab.orphans() and time.monotonic() < end:
        time.sleep(0.1)
    assert lab.orphans() == []
