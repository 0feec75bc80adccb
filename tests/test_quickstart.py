"""The quickstart's bookkeeping: what is reused, what is run again, what is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.tasks.generation_eval import Question
from minigpt4.tools.quickstart import _by_type, _mean
from minigpt4.tools.steps import Steps, call


def test_a_step_runs_once_and_again_only_when_its_inputs_change(tmp_path: Path) -> None:
    ran: list[str] = []

    def action() -> str:
        ran.append("x")
        return '{"answer": 1}'

    for inputs in (["a"], ["a"], ["b"], ["b"]):
        steps = Steps(tmp_path, Console(quiet=True))
        assert steps.run("step", "A step", inputs, action) == '{"answer": 1}'
    assert len(ran) == 2


def test_a_step_whose_result_is_gone_runs_again(tmp_path: Path) -> None:
    target = tmp_path / "result"

    def action() -> str:
        target.mkdir()
        return str(target)

    Steps(tmp_path, Console(quiet=True)).run("step", "A step", [], action)
    target.rmdir()
    Steps(tmp_path, Console(quiet=True)).run("step", "A step", [], action)
    assert target.is_dir()


def test_reused_steps_count_with_the_time_they_took(tmp_path: Path) -> None:
    first = Steps(tmp_path, Console(quiet=True))
    first.run("step", "A step", [], lambda: '"done"')
    second = Steps(tmp_path, Console(quiet=True))
    second.run("step", "A step", [], lambda: '"done"')
    assert second.totals() == first.totals()
    assert first.totals()[0] > 0


def test_a_failing_program_ends_the_quickstart_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(MiniGPT4Error, match="exit code 3"):
        call(["-c", "raise SystemExit(3)"], tmp_path)


def test_scores_stand_beside_their_baselines() -> None:
    kinds = ["glasses"] * 4 + ["beard"] * 2
    references = ["Yes", "No", "Yes", "Yes", "No", "Yes"]
    questions = [Question(Path("a"), kind, "q", ref) for kind, ref in zip(kinds, references, strict=True)]
    answers = {"accuracy": ["Yes", "No", "No", "Yes", "No", "Yes"], "blank_image": ["Yes"] * 6}
    scores = _by_type(questions, answers)
    assert scores["glasses"] == {"accuracy": 0.75, "blank_image": 0.75, "majority": 0.75, "n": 4}
    assert scores["beard"] == {"accuracy": 1.0, "blank_image": 0.5, "majority": 0.5, "n": 2}
    assert _mean(scores, "accuracy") == pytest.approx(0.875)
