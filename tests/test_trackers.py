"""What a run says on the terminal, in log.txt and to trackers that may be absent."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minigpt4.common import logger
from minigpt4.common.curve import draw_curve, smoothed
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import RunInfo, WindowRecord, build_trackers, read_log

RECORD = WindowRecord(
    window=1, epoch=0, iteration=8, loss=2.0, loss_avg=2.5, lr=3e-5, grad_norm=1.0, samples=16, target_tokens=400,
    samples_per_s=4.0, target_tokens_per_s=100.0, data_share=0.1, wait_s=0.4, vision_s=0.5,
    language_s=1.0, backward_s=2.0, optimizer_s=0.1, vision_gb=1.0, language_gb=5.0, backward_gb=7.5, optimizer_gb=3.0,
    memory_gb=7.5, elapsed_s=4.0, eta_s=3725.0, skipped=0,
)  # fmt: skip


def _info(folder: Path, start_window: int = 0) -> RunInfo:
    return RunInfo(folder, "job/1", {"run": {"seed": 42}}, total_windows=100, start_window=start_window, max_epoch=5)


def _logged(folder: Path, *windows: int) -> None:
    (tracker,) = build_trackers(["jsonl"])
    tracker.start(_info(folder))
    for window in windows:
        tracker.log(replace(RECORD, window=window))
        tracker.metrics(window, {"val_loss": 1.0})


def test_log_txt_starts_with_the_configuration_and_holds_numbers(tmp_path: Path) -> None:
    _logged(tmp_path, 1)
    config, record, validation = (json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines())
    assert config == {"config": {"run": {"seed": 42}}}
    assert record == asdict(RECORD)
    assert validation == {"event": "validation", "window": 1, "val_loss": 1.0}


def test_a_norm_that_overflowed_is_null_in_strict_json(tmp_path: Path) -> None:
    (tracker,) = build_trackers(["jsonl"])
    tracker.start(_info(tmp_path))
    tracker.log(replace(RECORD, grad_norm=float("inf")))
    assert read_log(tmp_path / "log.txt")[1]["grad_norm"] is None


def test_a_resumed_log_drops_what_came_after_the_checkpoint_and_a_line_cut_short(tmp_path: Path) -> None:
    _logged(tmp_path, 1, 2, 3)
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"window": 4, "lo')
    (tracker,) = build_trackers(["jsonl"])
    tracker.start(_info(tmp_path, start_window=2))
    tracker.log(replace(RECORD, window=3, loss=7.0))
    rows = read_log(tmp_path / "log.txt")
    assert [(row["window"], row["loss"]) for row in rows if "loss" in row] == [(1, 2.0), (2, 2.0), (3, 7.0)]
    assert [row["window"] for row in rows if row.get("event") == "resumed"] == [2]


def test_without_a_terminal_a_log_point_is_one_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tracker,) = build_trackers(["terminal"])
    with caplog.at_level("INFO", "minigpt4"):
        tracker.start(_info(tmp_path))
        tracker.advance(1)
        tracker.log(RECORD)
        tracker.close()
    (line,) = (record.getMessage() for record in caplog.records)
    for part in ("epoch 1/5", "window 1/100", "loss 2.5000", "lr 3.000e-05", "4.00 samples/s", "7.5 GB", "eta 1:02:05"):
        assert part in line


def test_on_a_terminal_a_bar_shows_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = logger.Console(force_terminal=True, width=200, file=(tmp_path / "screen").open("w+"))
    monkeypatch.setattr(logger, "console", console)
    (tracker,) = build_trackers(["terminal"])
    tracker.start(_info(tmp_path))
    tracker.advance(1)
    tracker.log(RECORD)
    tracker.close()
    console.file.close()
    screen = (tmp_path / "screen").read_text()
    assert "window 1/100" in screen and "loss 2.5000" in screen and "100 target tokens/s" in screen


def test_wandb_gets_one_run_per_job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values["loss"])), finish=lambda: calls.append("end")
    )
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or run, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    job = tmp_path / "job" / "20260101_000000"
    (tracker,) = build_trackers(["wandb"])
    tracker.start(_info(job))
    tracker.log(RECORD)
    tracker.close()
    options, logged, end = calls
    assert (options["project"], options["name"], options["id"]) == ("minigptv", "job/1", "job-20260101_000000")
    assert (logged, end) == ((1, 2.0), "end")


def test_unknown_and_absent_trackers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown 'tensorbord' .did you mean 'tensorboard'"):
        build_trackers(["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        build_trackers(["tensorboard"])


def test_the_curve_is_drawn_from_the_log_and_replaced_whole(tmp_path: Path) -> None:
    draw_curve(tmp_path)
    assert not list(tmp_path.iterdir())
    _logged(tmp_path, 1, 2, 3)
    draw_curve(tmp_path)
    assert (tmp_path / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "training_curve.png"]


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert smoothed([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])
