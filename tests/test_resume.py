"""A run that was stopped, killed or finished goes on (or does not) exactly as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minigpt4.common.checkpoint import find_last, read_checkpoint
from minigpt4.common.dist import single
from minigpt4.common.errors import CheckpointError, ConfigError, DataError
from minigpt4.common.logger import read_log
from minigpt4.common.schema import Config
from minigpt4.runners import changes
from minigpt4.runners.job import question_processor
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import SIZE, TinyDataset, tiny_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _train(cfg: Config) -> tuple[RunnerBase, int]:
    runner = RunnerBase(cfg, single("cpu"))
    return runner, runner.train()


def _job(folder: Path) -> Path:
    (job,) = (folder / "tiny").iterdir()
    return job


def _losses(job: Path) -> dict[int, float]:
    return {row["window"]: row["loss"] for row in read_log(job / "log.txt") if "loss" in row}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 windows with dropout that nobody touched."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    assert _train(tiny_config(folder, dropout=0.3))[1] == 0
    return folder


def test_a_run_leaves_a_folder_that_explains_itself(undisturbed: Path) -> None:
    job = _job(undisturbed)
    rows = read_log(job / "log.txt")
    assert rows[0]["config"]["run"]["init_lr"] == 1e-2
    records = [row for row in rows if "loss" in row]
    assert [row["window"] for row in records] == list(range(1, 9))
    assert [row["epoch"] for row in records] == [0] * 4 + [1] * 4
    assert [row["iteration"] for row in records] == list(range(2, 17, 2))
    assert all(isinstance(value, int | float) for row in records for value in row.values())
    assert records[-1]["loss"] < records[0]["loss"]
    assert (job / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((job / "manifest.json").read_text())
    assert manifest["question_processor"] == "identity"
    assert manifest["data"]["one"]["samples"] == 14 and manifest["versions"]["torch"]
    checkpoint = find_last(job)
    assert checkpoint is not None and checkpoint.step == 8
    assert checkpoint.manifest["metrics"]["loss"] == records[-1]["loss"]
    assert set(checkpoint.load_weights()) == {
        "projection.weight", "projection.bias", "mix.weight", "mix.bias", "head.weight", "head.bias"
    }  # fmt: skip


def test_after_sigkill_the_remaining_losses_are_bit_equal(undisturbed: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dropout": 0.3, "save_every": 4, "kill_at": 5}
    child = [sys.executable, "-m", "tests.engine_child", str(tmp_path), json.dumps(settings)]
    killed = subprocess.run(child, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    job = _job(tmp_path)
    assert sorted(_losses(job)) == [1, 2, 3, 4, 5]
    (job / "checkpoints" / ".writing_step_5_1").mkdir()  # what a kill in the middle of a save leaves behind
    runner, code = _train(tiny_config(tmp_path, dropout=0.3, resume_ckpt_path="auto"))
    assert code == 0 and runner.job_dir == job
    assert _losses(job) == _losses(_job(undisturbed))
    manifest = json.loads((job / "manifest.json").read_text())
    assert "/checkpoints/step_4" in manifest["resumed_from"] and manifest["window"] == 8
    assert [start["resumed_from"] for start in manifest["earlier_starts"]] == [None]
    expected = read_checkpoint(_job(undisturbed)).load_weights()
    assert all(torch.equal(expected[name], value) for name, value in runner.model.trainable_state().items())


def test_sigterm_finishes_the_window_and_saves_and_workers_change_nothing(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_window = RunnerBase._after_window

    def terminated(self: RunnerBase, number: int, stats: Any) -> bool:
        goes_on = after_window(self, number, stats)
        if number == 1 and goes_on:
            os.kill(os.getpid(), signal.SIGTERM)
        return goes_on

    monkeypatch.setattr(RunnerBase, "_after_window", terminated)
    cfg = tiny_config(tmp_path, dropout=0.3, num_workers=2)
    before = signal.getsignal(signal.SIGTERM)
    runner, code = _train(cfg)
    assert code == 128 + signal.SIGTERM
    assert runner.progress.window == 3  # the signal came during window 3
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    checkpoint = find_last(runner.job_dir)
    assert checkpoint is not None and checkpoint.step == 3 and checkpoint.can_resume
    again, code = _train(replace(cfg, run=replace(cfg.run, resume_ckpt_path=str(runner.job_dir))))
    assert code == 0
    assert _losses(again.job_dir) == _losses(_job(undisturbed))


def test_a_finished_run_says_so_and_touches_nothing(undisturbed: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = _job(undisturbed)
    before = {path: path.stat().st_mtime_ns for path in job.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", "minigpt4"):
        _, code = _train(tiny_config(undisturbed, dropout=0.3, resume_ckpt_path="auto"))
    assert code == 0
    assert "nothing left to train: 8 of 8" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in job.rglob("*") if path.is_file()} == before


def test_settings_that_change_the_order_are_named(undisturbed: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = tiny_config(undisturbed, resume_ckpt_path="auto", seed=43)
    RunnerBase(replace(cfg, datasets={"one": replace(cfg.datasets["one"], batch_size=4)}), single("cpu"))
    for text in ("run.seed: 42 in the checkpoint, 43 now", "batch_size: {'one': 3, 'two': 2}", "sample_ratio"):
        assert text in caplog.text


def _resumed(folder: Path, run: dict[str, Any] | None = None, **model: Any) -> RunnerBase:
    cfg = tiny_config(folder, dropout=0.3, resume_ckpt_path="auto", **(run or {}))
    return RunnerBase(replace(cfg, model=replace(cfg.model, **model)), single("cpu"))


def test_settings_that_change_what_the_same_weights_compute_are_named(
    undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _resumed(undisturbed, run={"weight_decay": 0.1, "log_freq": 7}, end_sym="###", dropout=0.1, image_size=SIZE)
    for text in (
        r"model.end_sym: '\n' in the checkpoint, '###' now; the weights were trained with the former",
        "model.dropout: 0.3 in the checkpoint, 0.1 now",  # a key of this model alone
        "run.weight_decay: 0.05 in the checkpoint, 0.1 now; losses will differ",
    ):
        assert text in caplog.text
    assert "log_freq" not in caplog.text and "image_size" not in caplog.text


@pytest.fixture
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve per checkpoint costs more than the tiny runs themselves."""
    monkeypatch.setattr("minigpt4.runners.runner_base.draw_curve", lambda job_dir: None)


@pytest.mark.usefixtures("_no_curve")
def test_settings_of_memory_and_files_that_moved_are_no_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_config(tmp_path, max_epoch=1, iters_per_epoch=2)
    model = replace(cfg.model, llama_model="/here/vicuna-7b", lora_alpha=16)
    _train(replace(cfg, model=model))
    moved = replace(model, llama_model="there/vicuna-7b", lora_alpha=32, use_grad_checkpoint_llm=True)
    moved = replace(moved, vit_weights="there/eva_vit_g.pth")  # the file that no name means, by its name
    again = replace(cfg, model=moved, run=replace(cfg.run, resume_ckpt_path="auto"))
    RunnerBase(again, single("cpu"))
    assert "in the checkpoint" not in caplog.text
    RunnerBase(replace(again, model=replace(moved, llama_model="there/llama-7b")), single("cpu"))
    assert "model.llama_model: '/here/vicuna-7b' in the checkpoint, 'there/llama-7b' now" in caplog.text


@pytest.mark.parametrize("text", ["", "[1]", "model: 3", "run: {}", None])
def test_a_checkpoint_whose_settings_are_gone_is_told(text: str | None, tmp_path: Path) -> None:
    checkpoint: Any = SimpleNamespace(path=tmp_path, config_path=tmp_path / "config.yaml")
    if text is not None:
        checkpoint.config_path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config.yaml: (has no section 'model'|not readable as YAML)"):
        changes.check_lora(checkpoint, "model: {lora_r: 8}")


@pytest.mark.usefixtures("_no_curve")
def test_another_scale_of_lora_is_refused_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(tmp_path, max_epoch=1, iters_per_epoch=2)
    cfg = replace(cfg, model=replace(cfg.model, lora_r=8))
    _train(cfg)
    monkeypatch.setattr("minigpt4.runners.runner_base.build_model", lambda *_: pytest.fail("built"))
    other = replace(cfg.model, lora_alpha=32, lora_target_modules=["v_proj", "q_proj"])
    with pytest.raises(CheckpointError, match=r"model\.lora_alpha: 16 in the checkpoint, 32 now$"):
        RunnerBase(replace(cfg, model=other, run=replace(cfg.run, resume_ckpt_path="auto")), single("cpu"))


def test_a_shorter_run_than_the_checkpoint_is_refused(undisturbed: Path) -> None:
    with pytest.raises(CheckpointError, match="8 windows are done, the configuration asks for 4"):
        RunnerBase(tiny_config(undisturbed, resume_ckpt_path="auto", max_epoch=1), single("cpu"))


def test_an_earlier_checkpoint_starts_a_branch_in_a_folder_of_its_own(tmp_path: Path) -> None:
    first, _ = _train(tiny_config(tmp_path))
    early = first.job_dir / "checkpoints" / "step_4"
    branch, code = _train(tiny_config(tmp_path, resume_ckpt_path=str(early)))
    assert code == 0 and branch.job_dir != first.job_dir
    assert sorted(_losses(branch.job_dir)) == [5, 6, 7, 8]
    assert branch.manifest["resumed_from"] == str(early.resolve())
    assert _losses(branch.job_dir)[8] == _losses(first.job_dir)[8]


def test_auto_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    runner = RunnerBase(tiny_config(tmp_path, resume_ckpt_path="auto"), single("cpu"))
    assert runner.progress.window == 0


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    folders = {RunnerBase(cfg, single("cpu")).job_dir for _ in range(3)}
    assert len(folders) == 3


def test_validation_moves_best_and_retention_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([3.0, 1.0, 2.0, 2.5])
    runner = RunnerBase(tiny_config(tmp_path, with_val=True, save_every=4, keep_last=1), single("cpu"))
    monkeypatch.setattr(runner.task, "validate", lambda training, batches: next(measured))
    assert runner.train() == 0
    folder = runner.job_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last", "step_4", "step_8"]
    assert read_checkpoint(folder / "best").manifest["metrics"]["val_loss"] == 1.0
    checks = [row for row in read_log(runner.job_dir / "log.txt") if row.get("event") == "validation"]
    assert [row["val_loss"] for row in checks] == [3.0, 1.0, 2.0, 2.5]


def test_validation_reads_each_record_of_the_split_once(tmp_path: Path) -> None:
    runner = RunnerBase(tiny_config(tmp_path, with_val=True), single("cpu"))
    seen: list[str] = []
    forward = runner.model.forward

    def watched(batch: Any) -> Any:
        seen.extend(batch.sample_ids)
        return forward(batch)

    runner.model.forward = watched  # type: ignore[method-assign]
    values = runner.validator.run(runner.training).values
    assert sorted(seen) == [f"one/{index}" for index in range(5)]
    assert values["val_loss"] == values["val_loss/one"] > 0


def test_an_absent_iters_per_epoch_is_one_pass_in_whole_windows(tmp_path: Path) -> None:
    runner = RunnerBase(tiny_config(tmp_path, iters_per_epoch=None, accum_grad_iters=4), single("cpu"))
    # 23 samples, (2/3 * 3 + 1/3 * 2) = 2.67 per micro-batch: 9 micro-batches, 3 windows of 4
    assert (runner.plan.windows_per_epoch, runner.plan.iters_per_epoch) == (3, 12)


def test_iters_per_epoch_is_rounded_up_to_whole_windows_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "minigpt4"):
        runner = RunnerBase(tiny_config(tmp_path, iters_per_epoch=7), single("cpu"))
    assert runner.plan.windows_per_epoch == 4
    assert "rounded up to 8" in caplog.text


def test_a_tracker_whose_package_is_absent_is_named_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        RunnerBase(tiny_config(tmp_path, trackers=["terminal", "wandb"]), single("cpu"))
    assert not list(tmp_path.iterdir())


def test_question_processor_is_that_of_the_set_drawn_most(tmp_path: Path) -> None:
    one, two = tiny_config(tmp_path).datasets.values()
    caption = replace(one.text_processor, train=replace(one.text_processor.train, name="blip_caption"))
    assert question_processor([replace(one, text_processor=caption), two]) == "blip_caption"
    assert question_processor([one, replace(two, text_processor=caption)]) == "identity"
    assert question_processor([replace(one, text_processor=caption, process_text=["answers"]), two]) == "identity"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_record_is_named_without_a_workers_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    runner = RunnerBase(tiny_config(tmp_path, num_workers=num_workers), single("cpu"))

    def broken(self: TinyDataset, *_: int) -> None:
        raise DataError("dataset 'one', record 3: field 'answer' is empty")

    monkeypatch.setattr(TinyDataset, "sample", broken)
    with pytest.raises(DataError) as caught:
        runner.train()
    assert str(caught.value) == "dataset 'one', record 3: field 'answer' is empty"


def test_a_data_set_without_samples_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyDataset, "__len__", lambda self: 0)
    with pytest.raises(Exception, match="dataset 'one', split train: has no samples"):
        RunnerBase(tiny_config(tmp_path), single("cpu"))
