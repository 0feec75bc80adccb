"""`minigpt4 ls`: every name on one line that says something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4 import catalog, cli
from minigpt4.common.registry import KINDS, registry
from minigpt4.tools import listing
from minigpt4.tools.config_reference import names
from tests.config_fakes import REPOSITORY

LONGEST = 110
"""Characters of a description that are still read at a glance."""


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    catalog.load()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["ls", *arguments]) == 0
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a user's mistake."""
    assert cli.main(["ls", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def descriptions() -> dict[str, str]:
    """'kind name' -> text, of everything the package brings."""
    found = {}
    for kind in listing.WRITTEN_IN:
        known = listing.entries(kind)
        found |= {f"{kind} {name}": known[name] for name in (names(kind) if kind in KINDS else known)}
    return found


def test_every_registered_kind_is_listed() -> None:
    assert set(KINDS) <= set(listing.WRITTEN_IN)


def test_each_kind_has_a_heading_and_its_names_stand_under_it(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = printed(capsys).rstrip("\n").split("\n\n")
    assert [block.partition(" ")[0] for block in blocks] == list(listing.WRITTEN_IN)
    for block, kind in zip(blocks, listing.WRITTEN_IN, strict=True):
        head, *lines = block.splitlines()
        assert head == f"{kind} ({listing.WRITTEN_IN[kind]})"
        assert [line.strip().partition("  ")[0] for line in lines] == list(listing.entries(kind))


def test_a_description_is_one_short_sentence() -> None:
    wrong = [
        f"{name}: {text}"
        for name, text in descriptions().items()
        if not 15 <= len(text) <= LONGEST
        or not (text[0].isupper() or text[0] == "`")
        or any(sign in text for sign in ("\n", "``"))
        or text.endswith(".")
        or text.count("`") % 2
    ]
    assert wrong == []


def test_descriptions_tell_names_of_one_kind_apart() -> None:
    found = descriptions()
    assert len(set(found.values())) == len(found)


def test_descriptions_start_in_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "dataset").splitlines()[1:]
    starts = {line.index(text) for line, text in zip(lines, listing.entries("dataset").values(), strict=True)}
    assert len(starts) == 1


@pytest.mark.parametrize("written", ["format", "formats"])
def test_one_kind_may_be_asked_for_in_singular_or_plural(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, written).splitlines()
    assert lines[0] == "format (datasets.NAME.format)"
    assert any(line.startswith("  vqa  ") for line in lines)


def test_an_unknown_kind_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "formt")
    assert line.startswith("error: unknown kind 'formt' (did you mean 'format'?)")
    assert all(kind in line for kind in listing.WRITTEN_IN)


@pytest.mark.parametrize("arguments", [["dataset"], ["config"], ["model_type"], ["formt"]])
def test_what_needs_no_classes_comes_without_torch(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom minigpt4 import cli\ncli.main(['ls', *{arguments}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's modules; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "_entries", {kind: {**known} for kind, known in registry._entries.items()})
    return tmp_path


def test_a_users_own_modules_are_listed_too(own_modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "from minigpt4.common.registry import registry\n\n"
        "@registry.register('format', 'haiku')\ndef haiku(record, prompts, rng):\n"
        '    """Three lines, e.g. one about\n    a frog. Seldom used."""\n'
    )
    (own_modules / "ls_test_formats.py").write_text(text, encoding="utf-8")
    lines = printed(capsys, "format", "--plugins", "ls_test_formats").splitlines()
    assert [line.split("  ")[-1] for line in lines if "haiku" in line] == ["Three lines, e.g. one about a frog"]


def test_a_missing_module_of_the_user_is_one_line(own_modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "plugin 'no_such_module' cannot be imported" in error_of(capsys, "format", "--plugins", "no_such_module")


def test_paths_of_examples_can_be_used_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = listing.entries("config")
    assert len(found) > 10 and all(Path(name).is_file() for name in found)


def test_presets_are_listed_among_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = sorted(path.name for path in (REPOSITORY / "train_configs" / "presets").glob("*.yaml"))
    lines = [line.split() for line in printed(capsys, "config").splitlines() if "/presets/" in line]
    assert [Path(line[0]).name for line in lines] == shipped
    assert all(line[1:5] == ["For", "a", "card", "of"] for line in lines)


def test_an_installed_package_says_where_the_examples_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "REPOSITORY_ROOT", tmp_path)
    assert "  none: the examples come with a checkout of the repository" in printed(capsys, "config")
