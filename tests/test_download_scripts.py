"""Tables for img2dataset, and the scripts that call it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "dataset"
sys.path.insert(0, str(FOLDER))

import caption_table  # noqa: E402
import convert_cc_sbu  # noqa: E402
import convert_laion  # noqa: E402

SETS = {"laion": convert_laion, "cc_sbu": convert_cc_sbu}
SCRIPTS = [FOLDER / f"download_{name}.sh" for name in SETS]


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream, delimiter="\t"))


@pytest.mark.parametrize("name", SETS)
def test_a_caption_list_becomes_a_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = [
        {"caption": 'a "red"\tbus\n near a pier', "url": "http://h/1.jpg"},
        {"url": "http://h/é", "caption": "b"},
    ]
    Path(f"{SETS[name].NAME}.json").write_text(json.dumps(records))
    SETS[name].main([])
    assert rows(Path(f"{SETS[name].NAME}.tsv")) == [
        ["url", "caption"],
        ["http://h/1.jpg", 'a "red" bus near a pier'],
        ["http://h/é", "b"],
    ]


def test_a_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt4.datasets.json_lists._CHUNK", 64)
    records = [{"caption": f"picture {number}", "url": f"http://h/{number}"} for number in range(500)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    convert_laion.main([str(tmp_path / "a.json"), "--out", str(tmp_path / "a.tsv")])
    assert len(rows(tmp_path / "a.tsv")) == 501


def test_records_without_address_or_caption_are_counted_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('[{"url": "u", "caption": "c"}, {"url": "u"}, {"caption": 3, "url": "u"}]')
    convert_laion.main([str(tmp_path / "a.json"), "--out", str(tmp_path / "a.tsv")])
    assert len(rows(tmp_path / "a.tsv")) == 2
    assert "2 records left out, for example record 1 has url" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"url": "u"}', "not a JSON list"),
        ('[{"url": "u", "caption": "c"}, {"url"', "after row 1: not a JSON list"),
        ("[3]", "record 0: found int"),
        ('[{"url": "u"}]', "no record has the fields url and caption"),
    ],
)
def test_a_broken_list_leaves_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SystemExit):
        convert_laion.main([str(tmp_path / "a.json"), "--out", str(tmp_path / "a.tsv")])
    assert message in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_table_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("mine")
    with pytest.raises(SystemExit):
        caption_table.main("", "a.json", str(tmp_path / "a.tsv"), [])
    assert (tmp_path / "a.tsv").read_text() == "mine"


def call(script: Path, *options: str, path: str = "") -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(["bash", str(script), *options], capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_download_script_calls_img2dataset_with_the_table(script: Path, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "usage: dataset/" + script.name in call(script, "--help").stdout
    fake = tmp_path / "img2dataset"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    table = tmp_path / "my table.tsv"
    table.write_text("url\tcaption\n")
    done = call(script, str(table), str(tmp_path / "out"), "--image-size", "256", "--threads", "8", path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in (f"--url_list {table} --input_format tsv", "--output_format webdataset", "--image_size 256"):
        assert words in done.stdout
    assert "--processes_count 16 --thread_count 8" in done.stdout and (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.tsv"], "'nowhere.tsv' not found; make it with"),
        (["--threads", "many"], "--threads needs a number"),
        (["--thread", "3"], "unknown option --thread"),
        (["a", "b", "c"], "expected TABLE and FOLDER"),
    ],
)
def test_a_download_script_names_the_mistake(options: list[str], message: str) -> None:
    done = call(SCRIPTS[0], *options)
    assert done.returncode == 2 and message in done.stderr


def test_a_download_script_looks_in_its_own_set_s_folders_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, script in zip(SETS, SCRIPTS, strict=True):
        shown = call(script, "--help").stdout
        assert f"convert_{name}.py" in shown and f"{SETS[name].NAME}.tsv" in shown and f"{name}/{name}_dataset" in shown
        assert call(script).stderr.startswith(
            f"download_{name}.sh: '{name}/{Path(SETS[name].NAME).name}.tsv' not found"
        )
