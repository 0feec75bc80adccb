"""Checkpoint directories: complete or refused, kept or deleted, never executed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.common.checkpoint import find_last, read_checkpoint, save_checkpoint
from minigpt4.common.errors import CheckpointError


def _save(job: Path, step: int, **options: Any) -> Path:
    return save_checkpoint(
        job / "checkpoints",
        step,
        weights={"llama_proj.weight": torch.full((2, 3), float(step))},
        config_text="run: {}\n",
        manifest={"metrics": {"loss": 1.0}},
        resume={"optimizer": {"llama_proj.weight": {"exp_avg": torch.ones(2, 3)}}, "state": {"window": step}},
        **{"keep_last": 3, **options},
    )


def _steps(job: Path) -> list[str]:
    return sorted(path.name for path in (job / "checkpoints").iterdir())


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(_save(tmp_path, 7))
    assert checkpoint.step == 7
    assert torch.equal(checkpoint.load_weights()["llama_proj.weight"], torch.full((2, 3), 7.0))
    optimizer, state = checkpoint.load_resume()
    assert torch.equal(optimizer["llama_proj.weight"]["exp_avg"], torch.ones(2, 3))
    assert state == {"window": 7}
    assert checkpoint.config_path.read_text() == "run: {}\n"
    assert checkpoint.manifest["metrics"] == {"loss": 1.0}


def test_links_and_job_folders_open_as_checkpoints(tmp_path: Path) -> None:
    _save(tmp_path, 1, is_best=True)
    _save(tmp_path, 2)
    assert read_checkpoint(tmp_path / "checkpoints" / "best").step == 1
    assert read_checkpoint(tmp_path / "checkpoints" / "last").step == 2
    assert read_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "resume/optimizer.pt", "resume/state.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_checkpoint(path)


def test_a_file_cut_short_is_named_with_its_sizes(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    size = (path / "model.safetensors").stat().st_size
    os.truncate(path / "model.safetensors", size // 2)
    with pytest.raises(CheckpointError, match=f"model.safetensors has {size // 2} bytes, expected {size}"):
        read_checkpoint(path)


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    good = _save(tmp_path, 3)
    shutil.copytree(good, good.with_name(".writing_step_9_1"))
    shutil.copytree(good, good.with_name("step_5"))
    (good.with_name("step_5") / "manifest.json").unlink()
    found = find_last(tmp_path)
    assert found is not None and found.step == 3
    _save(tmp_path, 6)
    assert ".writing_step_9_1" not in _steps(tmp_path)


def test_a_job_without_a_complete_checkpoint_has_no_last(tmp_path: Path) -> None:
    assert find_last(tmp_path) is None
    (_save(tmp_path, 3) / "config.yaml").unlink()
    assert find_last(tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_checkpoint(tmp_path)


def test_retention_keeps_the_newest_and_never_deletes_best(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11, 12):
        _save(tmp_path, step, keep_last=2, is_best=step == 2)
    assert _steps(tmp_path) == ["best", "last", "step_11", "step_12", "step_2"]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step_2"
    assert os.readlink(tmp_path / "checkpoints" / "last") == "step_12"


def test_keep_last_zero_keeps_all(tmp_path: Path) -> None:
    for step in range(5):
        _save(tmp_path, step, keep_last=0)
    assert len(_steps(tmp_path)) == 6


def test_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    path = _save(tmp_path, 4)
    (path / "stray").write_text("old")
    _save(tmp_path, 4)
    assert not (path / "stray").exists()
    assert _steps(tmp_path) == ["last", "step_4"]


def test_a_step_that_a_kill_left_set_aside_is_found_by_whoever_goes_on(tmp_path: Path) -> None:
    _save(tmp_path, 2)
    final = _save(tmp_path, 4)
    aside = final.rename(final.with_name(".old_step_4_77"))
    reader = find_last(tmp_path)
    assert reader is not None and reader.step == 2 and aside.is_dir()  # reading alone changes nothing
    found = find_last(tmp_path, check_content=True)
    assert found is not None and found.path == final


def test_a_step_that_is_being_deleted_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 2)
    seen: list[list[str]] = []

    def watched(folder: Path) -> None:
        found = find_last(tmp_path, check_content=True)
        assert found is not None and found.step == 4 and folder.is_dir()
        seen.append(_steps(tmp_path))

    monkeypatch.setattr("minigpt4.common.checkpoint.shutil.rmtree", watched)
    _save(tmp_path, 4, keep_last=1)
    assert seen and all("step_2" not in steps for steps in seen)


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    path = save_checkpoint(
        tmp_path, 1, weights={"a": torch.ones(1)}, config_text="", manifest={}, resume=None, keep_last=1
    )
    checkpoint = read_checkpoint(path)
    assert not checkpoint.can_resume
    with pytest.raises(CheckpointError, match="weights only"):
        checkpoint.load_resume()


def test_pickled_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    path = _save(tmp_path, 1)
    trap = path / "resume" / "optimizer.pt"
    torch.save({"x": Trap()}, trap)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["resume/optimizer.pt"] = trap.stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="optimizer.pt: not readable"):
        read_checkpoint(path).load_resume()
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_jobs_means_its_newest_complete_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for job in ("20260101_000000", "20260101_000000_2", "20260101_000000_10"):
        _save(tmp_path / job, 1)
    (tmp_path / "20260102_000000" / "checkpoints" / "step_9").mkdir(parents=True)
    assert read_checkpoint(tmp_path).path == tmp_path / "20260101_000000_10" / "checkpoints" / "step_1"
    assert "20260102_000000: holds no complete checkpoint, passed over" in caplog.text
