"""The real wandb (offline) and tensorboard take a whole run: numbers, validations, canaries."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from minigpt4.common.dist import single
from minigpt4.common.logger import read_log
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import tiny_config


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that wandb and tensorboard followed, without a network."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        folder = tmp_path_factory.mktemp("tracked")
        runner = RunnerBase(
            tiny_config(folder, with_val=True, trackers=["jsonl", "wandb", "tensorboard"]), single("cpu")
        )
        assert runner.train() == 0
    return runner.job_dir


def test_wandb_offline_keeps_the_run_and_its_answers_on_disk(job: Path) -> None:
    (run,) = (job / "wandb").glob("offline-run-*")
    (content,) = run.glob("*.wandb")
    assert content.name == f"run-tiny-{job.name}.wandb"
    deadline = time.monotonic() + 30  # wandb's own process writes it, some time after the run has ended
    while content.stat().st_size < 1000 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert content.stat().st_size > 1000
    tables = [json.loads(path.read_text()) for path in sorted(run.rglob("canaries_*.table.json"))]
    assert [table["columns"] for table in tables] == [["source", "question", "reference", "answer"]] * 2
    logged = [row for row in read_log(job / "log.txt") if row.get("event") == "canaries"]
    assert [[row[3] for row in table["data"]] for table in tables] == [
        [answer["answer"] for answer in row["answers"]] for row in logged
    ]


def test_tensorboard_holds_the_numbers_of_the_log(job: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job / "tensorboard"))
    events.Reload()
    rows = read_log(job / "log.txt")
    losses = {row["window"]: row["loss"] for row in rows if "loss" in row}
    assert {point.step: point.value for point in events.Scalars("train/loss")} == pytest.approx(losses, rel=1e-6)
    checks = {row["window"]: row["val_loss"] for row in rows if row.get("event") == "validation"}
    assert {point.step: point.value for point in events.Scalars("val_loss")} == pytest.approx(checks, rel=1e-6)
    assert any(tag.startswith("canaries/one/0") for tag in events.Tags()["tensors"])
