"""The tools of the `minigpt4` command: found, explained, and one line for a mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minigpt4 import cli
from tests.config_fakes import REPOSITORY


@pytest.mark.parametrize("name", cli.TOOLS)
def test_a_tool_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: minigpt4 {name} ")


def test_the_command_lists_its_tools(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {summary}" in text for name, (_, summary) in cli.TOOLS.items())


@pytest.mark.parametrize("arguments", [["lss"], ["ls", "--colour"], ["cp"], ["env", "all"]])
def test_a_wrong_word_ends_with_2_and_one_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_python_dash_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "minigpt4", "ls", "datasets"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "  sharegpt_detail  " in done.stdout
    wrong = subprocess.run([*command[:-1], "dataste"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: unknown kind 'dataste' (did you mean 'dataset'?)")
    assert len(wrong.stderr.splitlines()) == 1
