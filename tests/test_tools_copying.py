"""`minigpt4 cp`: a copy that loads, that is whole, and that replaces nothing unasked."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4 import catalog, cli
from minigpt4.common.config import load_config
from minigpt4.common.schema import DatasetConfig
from minigpt4.datasets.cards import known_cards
from minigpt4.tools.listing import entries, example_files
from tests.config_fakes import REPOSITORY
from tests.test_config_shipped import USER_FILES, ids, with_weights

SHIPPED = REPOSITORY / "train_configs" / "quickstart_photos.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory; data and weights lie nowhere near."""
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("MINIGPT4_DATA", str(tmp_path / "data"))
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    catalog.load()
    return place


def cp(*arguments: str) -> int:
    return cli.main(["cp", *arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a user's mistake."""
    assert cp(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("path", USER_FILES, ids=ids(USER_FILES))
def test_a_copied_file_loads_and_says_what_the_shipped_one_says(
    path: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cp(path.stem, "mine.yaml") == 0
    loaded = with_weights(folder / "mine.yaml", tmp_path / "weights")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("minigpt4")] == []
    assert loaded.run.job_name == ""  # that of the file, so jobs of the copy are not jobs of the original
    copied, shipped = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in (folder / "mine.yaml", path))
    shipped["run"].pop("job_name", None)
    assert copied == shipped


@pytest.mark.parametrize("path", USER_FILES, ids=ids(USER_FILES))
def test_commands_in_a_copy_run_the_copy(path: Path, folder: Path) -> None:
    assert cp(path.stem, "my run.yaml") == 0
    head, command, *rest = (folder / "my run.yaml").read_text(encoding="utf-8").splitlines()
    label = path.relative_to(REPOSITORY).as_posix()
    assert head == f"# A copy of {label}. Run it:"
    assert command.startswith("#   minigpt4 ") and "--cfg-path 'my run.yaml'" in command
    assert (" chat " in command) is (path.parent.name == "eval_configs")
    assert not [line for line in rest if label in line]
    assert [line for line in rest if line.startswith("model:")]


@pytest.mark.parametrize(
    "name", ["quickstart_photos", "quickstart_photos.yaml", "train_configs/quickstart_photos.yaml"]
)
def test_a_file_is_named_with_or_without_its_folder(name: str, folder: Path) -> None:
    assert cp(name, "a.yaml") == 0
    assert "photographs:" in (folder / "a.yaml").read_text(encoding="utf-8")


def test_every_name_that_is_listed_can_be_copied(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [*entries("config"), *entries("dataset")]:
        assert cp(name, f"{folder}/all/") == 0, name
    assert len(list((folder / "all").iterdir())) == len(example_files()) + len(known_cards())


def test_names_of_files_and_of_data_sets_do_not_clash() -> None:
    assert not {path.stem for path in example_files()} & set(known_cards())


def test_the_last_line_says_how_to_go_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cp("quickstart_face", "a.yaml")
    cp("minigptv2_eval", "b.yaml")
    cp("laion", "c.yaml")
    cp("12gb", "d.yaml")
    assert capsys.readouterr().out.splitlines() == [
        "wrote a.yaml from train_configs/quickstart_face.yaml",
        "next: minigpt4 train --cfg-path a.yaml",
        "wrote b.yaml from eval_configs/minigptv2_eval.yaml",
        "next: minigpt4 chat --cfg-path b.yaml --image PICTURE",
        "wrote c.yaml from minigpt4/configs/datasets/laion/defaults.yaml",
        "next: put its block under datasets: of a training YAML",
        "wrote d.yaml from train_configs/presets/12gb.yaml",
        "next: write into a training YAML beside it: include: d.yaml",
    ]


@pytest.mark.parametrize("name", ["12gb", "presets/12gb.yaml", "train_configs/presets/12gb.yaml"])
def test_a_copied_preset_is_included_as_its_head_says(name: str, folder: Path) -> None:
    assert cp(name, "own.yaml") == 0
    head, include, *rest = (folder / "own.yaml").read_text(encoding="utf-8").splitlines()
    assert head == "# A copy of train_configs/presets/12gb.yaml. Use it in a YAML file beside it:"
    assert not [line for line in rest if "12gb.yaml" in line]
    content = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    path = folder / "run.yaml"
    path.write_text(f"{include.removeprefix('#')}\n".lstrip() + yaml.safe_dump(content), encoding="utf-8")
    assert load_config(path, check_data=False).model.load_in_4bit


def trained(folder: Path, blocks: dict[str, Any]) -> dict[str, DatasetConfig]:
    """Data sets of a training file that holds ``blocks``."""
    content = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**content, "datasets": blocks}), encoding="utf-8")
    return load_config(path, check_data=False).datasets


def test_a_training_file_takes_the_block_of_a_copied_card(folder: Path) -> None:
    blocks: dict[str, Any] = {}
    for name in known_cards():
        assert cp(name) == 0
        copied = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["datasets"]
        assert list(copied) == [name]
        blocks |= {name: {}, f"my_{name}": copied[name]}
    loaded = trained(folder, blocks)
    for name in known_cards():
        assert loaded[f"my_{name}"] == dataclasses.replace(loaded[name], name=f"my_{name}")


@pytest.mark.parametrize("name", known_cards())
def test_the_head_of_a_copied_card_is_comment_of_a_readable_width(name: str, folder: Path) -> None:
    assert cp(name) == 0
    head = (folder / f"{name}.yaml").read_text(encoding="utf-8").partition("\ndatasets:\n")[0].splitlines()
    assert f"'{name}'" in head[0]
    assert all(line.startswith("#") and len(line) <= 120 for line in head)


def test_an_existing_file_stays_unless_forced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folder / "a.yaml"
    target.write_text("mine", encoding="utf-8")
    assert error_of(capsys, "laion", "a.yaml") == (
        "error: 'a.yaml' exists; choose another name, or replace it with --force"
    )
    assert target.read_text(encoding="utf-8") == "mine"
    assert cp("laion", "a.yaml", "--force") == 0
    assert "laion" in target.read_text(encoding="utf-8")


def test_an_existing_file_in_a_directory_stays_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "laion.yaml").write_text("mine", encoding="utf-8")
    assert "'laion.yaml' exists" in error_of(capsys, "laion")
    assert (folder / "laion.yaml").read_text(encoding="utf-8") == "mine"


def test_a_link_that_leads_nowhere_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.yaml").symlink_to("elsewhere.yaml")
    assert "'a.yaml' exists" in error_of(capsys, "laion", "a.yaml")
    assert (folder / "a.yaml").is_symlink()


def test_a_shipped_file_is_never_its_own_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    before = SHIPPED.read_bytes()
    assert "is the shipped file itself" in error_of(capsys, "quickstart_photos", "train_configs", "--force")
    assert SHIPPED.read_bytes() == before


def test_a_directory_gets_the_file_under_its_own_name(folder: Path) -> None:
    (folder / "old").mkdir()
    assert cp("quickstart_face", "old") == 0
    assert cp("quickstart_face", "new/deep/") == 0
    assert cp("quickstart_face") == 0
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.yaml"))] == [
        "new/deep/quickstart_face.yaml",
        "old/quickstart_face.yaml",
        "quickstart_face.yaml",
    ]


@pytest.mark.parametrize(
    ("dest", "says"),
    [
        ("no/a.yaml", "'no': no such directory; 'no/' as DEST makes it"),
        ("my_configs", "'my_configs' is no directory and no YAML file; write 'my_configs/' or 'my_configs.yaml'"),
        ("", "DEST is empty; give a file that ends with .yaml, or a directory"),
        ("file.yaml/", "'file.yaml' is a file, not a directory"),
        ("file.yaml/a.yaml", "'file.yaml' is a file, not a directory"),
        ("taken/", "'taken/laion.yaml' is a directory"),
    ],
)
def test_a_place_that_cannot_hold_the_file_is_one_line(
    dest: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file.yaml").touch()
    (folder / "taken" / "laion.yaml").mkdir(parents=True)
    before = sorted(folder.rglob("*"))
    assert error_of(capsys, "laion", dest) == f"error: {says}"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quickstart_foto", "quickstart_photos"),
        ("sharegpt_deatil", "sharegpt_detail"),
        ("minigptv2_evil", "minigptv2_eval"),
    ],
)
def test_a_typo_names_the_nearest_and_writes_nothing(
    name: str, near: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, name, "made/")
    assert line.startswith(f"error: unknown config or data set '{name}' (did you mean '{near}'?)")
    assert "`minigpt4 ls config`" in line and "`minigpt4 ls dataset`" in line
    assert list(folder.iterdir()) == []


def test_a_file_of_ones_own_that_bears_a_shipped_name_is_not_what_is_copied(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "quickstart_face.yaml").write_text("mine", encoding="utf-8")
    assert "unknown config or data set" in error_of(capsys, "mine/quickstart_face.yaml", "a.yaml")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new(
    failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.yaml").write_text("mine", encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    told = "the disk is full; make room (of a run: run.keep_last keeps fewer checkpoints)"
    assert error_of(capsys, "laion", "a.yaml", "--force") == f"error: cannot write a.yaml: {told}"
    assert error_of(capsys, "laion", "b.yaml") == f"error: cannot write b.yaml: {told}"
    assert [path.name for path in folder.iterdir()] == ["a.yaml"]
    assert (folder / "a.yaml").read_text(encoding="utf-8") == "mine"


def test_copying_needs_no_torch(tmp_path: Path) -> None:
    code = (
        f"import sys\nfrom minigpt4 import cli\nassert cli.main(['cp', 'laion', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
