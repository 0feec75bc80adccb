"""A disk that is full, read-only or damaged: one clear error or a word about it, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt4.common.checkpoint import find_last, read_checkpoint
from minigpt4.common.errors import CheckpointError
from tests.resume_children import save_step
from tests.resume_harness import WINDOWS, Lab, assert_same_run, assert_whole, jobs, newest
from tests.torture.conftest import ALONE
from tests.torture.faults import fill_in_saves


def _copied(job: Path, folder: Path) -> Path:
    copy = folder / job.parent.name / job.name
    shutil.copytree(job, copy, symlinks=True)
    return copy


def _save_four(job: Path) -> None:
    save_step(job, 4, is_best=True)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_full_disk_in_any_file_operation_of_a_save_leaves_whole_checkpoints(lab: Lab) -> None:
    before, after = lab.home / "before", lab.home / "after"
    for step in (1, 2, 3):
        save_step(before, step, is_best=step == 1)
    process = lab.process(fill_in_saves, before, after, _save_four)
    process.join()
    assert process.exitcode == 0  # every refusal became an OutputError; the last save met none
    copies = sorted(after.iterdir(), key=lambda path: int(path.name))
    found_steps = []
    for job in copies:
        found = find_last(job, check_content=True)
        assert found is not None, job
        found_steps.append(found.step)
        for path in job.glob("checkpoints/step_*"):
            read_checkpoint(path, check_content=True)
        save_step(job, 5)
        assert not list(job.glob("checkpoints/.*")), job
    print(f"{len(copies) - 1} refused file operations survived")
    assert len(copies) > 15 and found_steps == sorted(found_steps) and set(found_steps) == {3, 4}


@pytest.mark.parametrize("window", [2, 6])
def test_a_disk_that_fills_up_ends_the_run_with_one_error_and_loses_nothing(
    lab: Lab, undisturbed: Path, window: int
) -> None:
    folder = lab.home / f"full_{window}"
    text = lab.start(folder, ALONE, crash=f"full:{window}").failed()
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "cannot write" in line and f".writing_step_{window}_" in line and "ulimit -f" in line
    assert_whole(folder)
    assert not list(newest(folder).glob("checkpoints/.writing*"))  # a full disk gets its room back
    lab.start(folder, ALONE).done()
    finished = newest(folder)
    assert len(jobs(folder)) == (2 if window == 2 else 1)  # nothing was saved before window 2
    assert_same_run(finished, undisturbed)


def test_an_output_folder_that_takes_no_files_is_named(lab: Lab) -> None:
    place = "/sys/kernel/minigpt4"  # nobody makes folders there, root neither
    text = lab.start(lab.home / "read_only", ALONE, f"run.output_dir={place}").failed()
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert place in line and "choose another folder (of a run: run.output_dir)" in line


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", _flip, "damaged, model.safetensors: other bytes than written"),
        ("resume/optimizer.pt", _flip, "damaged, resume/optimizer.pt: other bytes than written"),
        ("resume/state.json", _flip, "damaged, resume/state.json: other bytes than written"),
        ("resume/optimizer.pt", _cut, "incomplete, resume/optimizer.pt has"),
        ("manifest.json", _cut, "manifest.json: not readable as JSON"),
    ],
)
def test_auto_passes_over_a_damaged_checkpoint_by_name_and_ends_the_same(
    lab: Lab, undisturbed: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    folder = lab.home / f"{damage.__name__}_{Path(name).stem}"
    copy = _copied(undisturbed, folder)
    damage(copy / f"checkpoints/step_{WINDOWS}" / name)
    attempt = lab.start(folder, ALONE)
    attempt.done()
    text = attempt.text()
    assert "skipped: " in text and f"step_{WINDOWS}" in text and said in text
    assert f"resuming at window {WINDOWS - 2} of {WINDOWS}" in text
    assert jobs(folder) == [copy]  # it goes on in its own folder: what was damaged is written again
    read_checkpoint(copy, check_content=True)
    assert_same_run(copy, undisturbed)


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    path = _copied(undisturbed, tmp_path) / "checkpoints" / f"step_{WINDOWS}"
    _flip(path / "model.safetensors")
    read_checkpoint(path)  # the sizes are right
    with pytest.raises(CheckpointError, match=r"damaged, model\.safetensors: other bytes than written"):
        read_checkpoint(path, check_content=True)


def test_a_checkpoint_without_checksums_is_read_as_before(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    manifest = tmp_path / "checkpoints/step_1/manifest.json"
    content = json.loads(manifest.read_text())
    del content["checksums"]
    manifest.write_text(json.dumps(content))
    assert read_checkpoint(tmp_path, check_content=True).step == 1


def test_a_manifest_without_its_step_is_passed_over(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    manifest = tmp_path / "checkpoints/step_2/manifest.json"
    manifest.write_text(manifest.read_text().replace('"step"', '"stdp"'))
    found = find_last(tmp_path)
    assert found is not None and found.step == 1
