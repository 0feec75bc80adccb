"""`minigpt4 env`: what a bug report needs, and nothing that says who wrote it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minigpt4 import cli
from minigpt4.tools import environment
from tests.config_fakes import REPOSITORY


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["env", *arguments]) == 0
    return capsys.readouterr().out


def test_each_fact_is_one_line_and_values_start_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    facts = environment.collect()
    assert [line.split("  ")[0] for line in lines] == list(facts)
    width = max(map(len, facts)) + 2
    assert [line[width:] for line in lines] == list(facts.values())
    assert all(facts.values()) and not [line for line in lines if line[width] == " "]


def test_json_holds_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(printed(capsys, "--json")) == environment.collect()


def test_hosts_users_and_folders_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINIGPT4_DATA", "MINIGPT4_WEIGHTS", "HOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/srv/secretfolder/x")
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "secretuser")
    monkeypatch.setattr(platform, "node", lambda: "secrethost")
    monkeypatch.setattr(socket, "gethostname", lambda: "secrethost")
    text = json.dumps(environment.collect())
    assert "secret" not in text
    assert not re.search(rf"\b({re.escape(getpass.getuser())}|{re.escape(platform.uname().node)})\b", text)
    assert "/" not in text and "\\" not in text


def test_a_variable_with_a_folder_is_said_to_be_set_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_DATA", "/srv/data")
    monkeypatch.delenv("MINIGPT4_WEIGHTS", raising=False)
    facts = environment.collect()
    assert (facts["MINIGPT4_DATA"], facts["MINIGPT4_WEIGHTS"]) == ("set", "not set")


def test_every_package_of_the_project_is_listed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["web"], *extras["eval"]]
    names = {re.split(r"[<>=~! \[]", line)[0] for line in wanted}
    assert names - set(environment.collect()) == set()


def test_a_missing_package_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    assert environment.collect()["no-such-package"] == "not installed"


def test_versions_are_those_that_run() -> None:
    import torch

    facts = environment.collect()
    assert facts["torch"] == torch.__version__
    assert facts["python"].startswith(platform.python_version())


def test_a_torch_that_cannot_be_imported_is_reported_without_its_folder(tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    text = "raise ImportError('/home/jane doe/lib/libtorch.so: undefined symbol: x')\n"
    (broken / "__init__.py").write_text(text, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "minigpt4", "env", "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(result.stdout)
    assert facts["torch"] == "cannot be imported: libtorch.so: undefined symbol: x"
    assert "transformers" in facts and "CUDA of torch" not in facts


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("libcudart.so.12: cannot open shared object file", "libcudart.so.12: cannot open shared object file"),
        ('Error loading "C:\\Users\\jane doe\\lib\\c10.dll" or another', 'Error loading "c10.dll" or another'),
        ("cannot import name 'a' from 'b' (/home/jane/b.py)", "cannot import name 'a' from 'b' (b.py)"),
    ],
)
def test_messages_of_other_programs_lose_their_folders(message: str, shown: str) -> None:
    assert environment.without_folders(message) == shown


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "REPOSITORY_ROOT", tmp_path)
    assert environment.git_commit() == "none (not a git checkout)"


def test_a_machine_without_other_programs_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment, "REPOSITORY_ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = environment.collect()
    assert facts["git commit"] == "unknown (git does not answer)"
    assert facts.get("NVIDIA driver") == "none found"


def test_changes_of_a_checkout_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.txt").write_text("1", encoding="utf-8")
    git("add", "a.txt")
    git("commit", "-m", "first")
    monkeypatch.setattr(environment, "REPOSITORY_ROOT", tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", environment.git_commit())
    (tmp_path / "a.txt").write_text("2", encoding="utf-8")
    assert environment.git_commit().endswith(" with changes in 1 files")
