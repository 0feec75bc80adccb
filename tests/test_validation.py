"""Validation decides what is best and when a run ends, and shows the answers it saw."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.common.checkpoint import find_last, read_checkpoint
from minigpt4.common.dist import single
from minigpt4.common.errors import DataError
from minigpt4.common.logger import read_log
from minigpt4.common.schema import CanaryConfig
from minigpt4.metrics.answers import macro_f1, rouge_l
from minigpt4.runners.progress import Progress
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.runners.validation import Validator
from tests.engine_parts import TinyDataset, TinyModel, tiny_config


def _runner(folder: Path, valid: dict[str, Any], **run: Any) -> RunnerBase:
    torch.set_num_threads(1)
    return RunnerBase(tiny_config(folder, with_val=True, valid=valid, **run), single("cpu"))


def _events(runner: RunnerBase, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_log(runner.job_dir / "log.txt") if row.get("event") == kind]


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve per checkpoint costs more than the tiny runs themselves."""
    monkeypatch.setattr("minigpt4.runners.runner_base.draw_curve", lambda job_dir: None)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What validation will measure, in order."""
    planned: list[float] = []
    monkeypatch.setattr("tests.engine_parts.TASK.__class__.validate", lambda *_: planned.pop(0))
    yield planned


def test_metrics_of_answers_are_measured_per_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _runner(tmp_path, {"metrics": ["loss", "exact_accuracy"], "num_canaries": 0})
    (held_out,) = runner.validator.datasets
    references = [held_out.sample(0, index, 42).turns[-1].answer for index in range(5)]

    def generate(self: TinyModel, prompts: Any, images: torch.Tensor, options: Any) -> list[str]:
        assert len(images) == len(prompts) and options.max_new_tokens == 64
        asked = [self.encoder.tokenizer.decode(prompt.ids) for prompt in prompts]
        return [references[int(text.split("say ")[1])] if "say 3" not in text else "wrong" for text in asked]

    monkeypatch.setattr(TinyModel, "generate", generate)
    values = runner.validator.run(runner.training).values
    assert values["val_exact_accuracy"] == values["val_exact_accuracy/one"] == pytest.approx(4 / 5)
    assert values["val_loss"] > 0


def test_at_most_max_samples_are_asked_spread_over_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _runner(tmp_path, {"metrics": ["exact_accuracy"], "max_samples": 2, "num_canaries": 0})
    asked: list[int] = []
    sample = TinyDataset.sample
    monkeypatch.setattr(TinyDataset, "sample", lambda self, p, i, s: asked.append(i) or sample(self, p, i, s))
    assert list(runner.validator.run(runner.training).values) == ["val_exact_accuracy/one", "val_exact_accuracy"]
    assert asked == [0, 2]


def test_validation_has_its_own_period_and_a_better_value_is_saved_at_once(tmp_path: Path, losses: list[float]) -> None:
    losses += [3.0, 1.0, 2.0, 2.5]  # after windows 2, 4, 6, 8; checkpoints are due after 5 and 8
    runner = _runner(tmp_path, {"every": 4, "num_canaries": 0}, save_every=10, keep_last=0)
    assert runner.train() == 0
    assert [(row["window"], row["val_loss"]) for row in _events(runner, "validation")] == [
        (2, 3.0), (4, 1.0), (6, 2.0), (8, 2.5)
    ]  # fmt: skip
    folder = runner.job_dir / "checkpoints"
    steps = sorted(path.name for path in folder.iterdir() if not path.is_symlink())
    assert steps == ["step_2", "step_4", "step_5", "step_8"]
    assert read_checkpoint(folder / "best").step == 4
    assert read_checkpoint(folder / "best").manifest["metrics"]["val_loss"] == 1.0


def test_best_goes_by_the_named_metric_of_the_named_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.7, 0.7, 0.3])
    monkeypatch.setattr("minigpt4.metrics.answers.METRICS", {})
    valid = {"metrics": ["loss", "exact_accuracy"], "best_by": "exact_accuracy/one", "every": 4, "num_canaries": 0}
    runner = _runner(tmp_path, valid)
    monkeypatch.setattr(
        runner.validator, "_answer_metrics", lambda dataset, tell: ({"val_exact_accuracy/one": next(scores)}, [])
    )
    assert runner.train() == 0
    assert read_checkpoint(runner.job_dir / "checkpoints" / "best").step == 4  # higher is better, the first of equals
    assert (runner.progress.best, runner.progress.best_by) == (0.7, "exact_accuracy/one")


def test_patience_ends_the_run_and_it_stays_ended(
    tmp_path: Path, losses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    losses += [2.0, 2.1, 2.2]
    valid = {"every": 2, "patience": 2, "num_canaries": 0}
    runner = _runner(tmp_path, valid)
    with caplog.at_level("INFO"):
        assert runner.train() == 0
    assert runner.progress.window == 3 and runner.progress.is_over
    assert "no better loss in 2 validations (best: 2.0000 after window 1)" in caplog.text
    again = _runner(tmp_path, valid, resume_ckpt_path="auto")
    before = (runner.job_dir / "log.txt").read_bytes()
    with caplog.at_level("INFO"):
        assert again.train() == 0
    assert "nothing left to train: the run was stopped early" in caplog.text
    assert (runner.job_dir / "log.txt").read_bytes() == before


def test_staleness_survives_a_resume(tmp_path: Path, losses: list[float]) -> None:
    losses += [2.0, 2.5]
    first = _runner(tmp_path, {"patience": 2, "num_canaries": 0}, max_epoch=2)
    assert first.train() == 0 and not first.progress.is_over
    losses += [2.6]
    second = _runner(tmp_path, {"patience": 2, "num_canaries": 0}, max_epoch=4, resume_ckpt_path="auto")
    assert second.train() == 0
    assert (second.progress.window, second.progress.is_over, second.progress.best) == (12, True, 2.0)


def test_canaries_are_the_users_questions_and_held_out_samples(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (9, 7), "red").save(tmp_path / "face.png")
    own = [CanaryConfig("What is it?", str(tmp_path / "face.png")), CanaryConfig("Hello")]
    runner = _runner(tmp_path, {"every": 8, "canaries": own, "num_canaries": 1})
    assert runner.train() == 0
    first, second = _events(runner, "canaries")
    assert [row["source"] for row in first["answers"]] == ["canary 1", "canary 2", "one/0"]
    assert [row["question"] for row in first["answers"]] == ["What is it?", "Hello", "say 0"]
    assert first["answers"][2]["reference"] and not first["answers"][0]["reference"]
    assert all(len(row["answer"]) == 1 for row in second["answers"])
    assert (first["window"], second["window"]) == (4, 8)


def test_a_question_of_the_user_is_asked_without_any_held_out_data(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, valid={"canaries": [CanaryConfig("Hello")]})
    runner = RunnerBase(cfg, single("cpu"))
    assert runner.train() == 0
    assert [len(row["answers"]) for row in _events(runner, "canaries")] == [1, 1]
    assert find_last(runner.job_dir) is not None and _events(runner, "validation") == []


def test_evaluate_measures_and_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = _runner(tmp_path, {"metrics": ["loss", "exact_accuracy"]}, evaluate=True)
    with caplog.at_level("INFO"):
        assert runner.train() == 0
    assert "val_loss/one" in caplog.text and "val_exact_accuracy" in caplog.text and "canary one/0" in caplog.text
    assert not (runner.job_dir / "log.txt").exists()
    with pytest.raises(DataError, match="no data set holds anything out"):
        RunnerBase(tiny_config(tmp_path, evaluate=True), single("cpu")).train()


def test_a_value_that_is_no_number_is_never_best() -> None:
    progress = Progress(window=3)
    assert not progress.judge("loss", float("nan"), is_lower_better=True)
    assert progress.judge("loss", 2.0, is_lower_better=True) and progress.best_window == 3
    assert not progress.judge("loss", float("nan"), is_lower_better=True) and progress.stale == 1


def test_another_metric_starts_its_own_search_for_the_best() -> None:
    progress = Progress(best=0.1, best_by="loss", stale=3)
    assert progress.judge("rouge_l", 0.05, is_lower_better=False)
    assert (progress.best, progress.best_by, progress.stale) == (0.05, "rouge_l", 0)


def test_progress_survives_json() -> None:
    progress = Progress(window=4, best=1.5, best_by="loss", bad_records={"one": {7: "line 7: broken"}})
    again = Progress.from_state(json.loads(json.dumps(progress.to_state())))
    assert again.bad_records == progress.bad_records and again.to_state() == progress.to_state()


def test_macro_f1_weighs_rare_labels_like_frequent_ones() -> None:
    references = ["joy"] * 9 + ["fear"]
    assert macro_f1(["Joy."] * 10, references) == pytest.approx(0.5 * 18 / 19)
    assert macro_f1(references, references) == 1.0
    assert macro_f1(["banana"] * 10, references) == 0.0


def test_rouge_l_counts_the_longest_common_sequence() -> None:
    assert rouge_l(["a man smiles"], ["a man smiles"]) == pytest.approx(1.0)
    assert rouge_l(["a man frowns"], ["a man smiles"]) == pytest.approx(2 / 3)


def test_answers_of_the_newest_and_the_best_validation_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.2, 0.8, 0.4, 0.4])
    monkeypatch.setattr(Validator, "_loss", lambda *_: next(scores))
    valid = {"metrics": ["loss", "exact_accuracy"], "every": 4, "num_canaries": 0, "max_samples": 3}
    runner = _runner(tmp_path, valid)
    assert runner.train() == 0
    kept = {kind: read_log(runner.job_dir / "answers" / kind / "one.jsonl") for kind in ("last", "best")}
    assert [row["window"] for row in kept["best"]] == [2] * 3 and [row["window"] for row in kept["last"]] == [8] * 3
    (held_out,) = runner.validator.datasets
    samples = [held_out.sample(0, index, 42) for index in (0, 1, 3)]
    assert [row["id"] for row in kept["last"]] == [sample.sample_id for sample in samples]
    assert [row["reference"] for row in kept["last"]] == [sample.turns[-1].answer for sample in samples]
    for row, index in zip(kept["last"], (0, 1, 3), strict=True):
        assert (row["section"], row["meta"]) == (f"part {index % 2}", {"age": "old" if index % 3 else "young"})
        assert row["correct"] == {"exact_accuracy": row["answer"] == row["reference"]} and row["images"] == []


def _stop_in(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Every run is asked to stop while it trains ``window``."""
    after_window = RunnerBase._after_window

    def stopped(self: RunnerBase, number: int, stats: Any) -> bool:
        goes_on = after_window(self, number, stats)
        if number == window - 2:
            self.stop.number = signal.SIGTERM
        return goes_on

    monkeypatch.setattr(RunnerBase, "_after_window", stopped)


@pytest.mark.parametrize("window", [4, 8])
def test_a_validation_that_a_stop_left_out_comes_first_after_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    valid = {"every": 4, "metrics": ["loss", "rouge_l"]}
    alone = _runner(tmp_path / "alone", valid, save_every=10, keep_last=0)
    assert alone.train() == 0
    with monkeypatch.context() as patch:
        _stop_in(patch, window)
        patch.setattr(Validator, "run", _only_before(window))
        stopped = _runner(tmp_path / "stopped", valid, save_every=10, keep_last=0)
        assert stopped.train() == 128 + signal.SIGTERM
    resumed = _runner(tmp_path / "stopped", valid, save_every=10, keep_last=0, resume_ckpt_path="auto")
    assert resumed.train() == 0 and resumed.job_dir == stopped.job_dir
    for kind in ("validation", "canaries"):
        assert _events(resumed, kind) == _events(alone, kind) and len(_events(alone, kind)) == 4
    assert resumed.progress == alone.progress
    left, right = (read_checkpoint(runner.job_dir / "checkpoints" / "best") for runner in (resumed, alone))
    assert (left.step, left.manifest["metrics"]) == (right.step, right.manifest["metrics"])
    for kind in ("last", "best"):
        left_rows, right_rows = ((r.job_dir / "answers" / kind / "one.jsonl").read_text() for r in (resumed, alone))
        assert left_rows == right_rows


def _only_before(window: int) -> Any:
    """``Validator.run`` that fails at ``window``, where a stop must not wait for it."""
    run = Validator.run

    def checked(self: Validator, training: Any, tell: Any) -> Any:
        log = read_log(training.job_dir / "log.txt")
        assert max(row.get("window", 0) for row in log) < window, "a stopped run validates"
        return run(self, training, tell)

    return checked


def test_a_validation_made_up_for_can_end_the_run(
    tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses += [2.0, 2.1]
    valid = {"every": 4, "patience": 1, "num_canaries": 0}
    with monkeypatch.context() as patch:
        _stop_in(patch, 4)
        assert _runner(tmp_path, valid).train() == 128 + signal.SIGTERM
    resumed = _runner(tmp_path, valid, resume_ckpt_path="auto")
    assert resumed.train() == 0
    assert (resumed.progress.window, resumed.progress.is_over, losses) == (4, True, [])
    assert _runner(tmp_path, valid, resume_ckpt_path="auto").train() == 0  # asks for no further loss


def test_a_validation_made_up_for_twice_is_logged_once(
    tmp_path: Path, losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses += [2.0, 1.0, 1.0, 3.0, 3.0]
    valid = {"every": 4, "num_canaries": 1}
    with monkeypatch.context() as patch:
        _stop_in(patch, 4)
        assert _runner(tmp_path, valid).train() == 128 + signal.SIGTERM

    def lost(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunnerBase, "_save", lost)  # the process dies between the log and the checkpoint
        _runner(tmp_path, valid, resume_ckpt_path="auto").train()
    resumed = _runner(tmp_path, valid, resume_ckpt_path="auto")
    assert resumed.train() == 0
    assert [(row["window"], row["val_loss"]) for row in _events(resumed, "validation")] == [
        (2, 2.0), (4, 1.0), (6, 3.0), (8, 3.0)
    ]  # fmt: skip
    assert [row["window"] for row in _events(resumed, "canaries")] == [2, 4, 6, 8]
    best = read_checkpoint(resumed.job_dir / "checkpoints" / "best")
    assert (best.step, best.manifest["metrics"]["val_loss"]) == (4, 1.0)
