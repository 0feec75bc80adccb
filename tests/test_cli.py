"""The command line: quick to answer, and errors without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4 import cli
from minigpt4.common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def test_help_is_printed_without_heavy_imports() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train.py', '--help']\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'omegaconf'} & set(sys.modules), 'heavy'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--cfg-path" in result.stdout and "--options" in result.stdout


def test_train_gets_path_options_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(cli, "train", lambda *given: calls.append(given) or 0)
    arguments = ["--cfg-path", "a.yaml", "--options", "run.seed=1", "model.arch=minigpt4", "--resume", "auto"]
    assert cli.main(["train", *arguments]) == 0
    assert cli.train_command(arguments) == 0
    assert calls == [("a.yaml", ["run.seed=1", "model.arch=minigpt4"], "auto", False)] * 2


def test_a_users_mistake_is_printed_line_by_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object) -> int:
        raise ConfigError("a.yaml:3: run.sed: unknown key\na.yaml:4: run.init_lr: found 'x'")

    monkeypatch.setattr(cli, "train", wrong)
    assert cli.main(["train", "--cfg-path", "a.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: a.yaml:3: run.sed: unknown key",
        "error: a.yaml:4: run.init_lr: found 'x'",
    ]


def test_ctrl_c_while_building_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    assert cli.main(["train", "--cfg-path", "a.yaml"]) == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise AssertionError("ours")

    monkeypatch.setattr(cli, "train", broken)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["train", "--cfg-path", "a.yaml"])
