"""``minigpt4 predict``: folders and files of questions, and mistakes that are told before weights load."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minigpt4.chat import loading
from minigpt4.chat.loading import load_assistant
from minigpt4.chat.session import ChatSession, open_image
from minigpt4.cli import main
from minigpt4.common.errors import DataError
from minigpt4.evaluation.questions import questions_of_file, questions_of_folder
from minigpt4.models.generation import GenerateOptions
from tests.config_fakes import REPOSITORY
from tests.evaluation_parts import draw_pictures, tiny_assistant
from tests.export_parts import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights-only checkpoint of the tiny MiniGPT-v2."""
    model = tiny_assistant().model
    return write_checkpoint(tmp_path_factory.mktemp("job"), model.cfg, model.trainable_state(), "blip_caption")


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    draw_pictures(tmp_path / "faces", 3)
    draw_pictures(tmp_path / "faces" / "more", 1, ".JPG")
    (tmp_path / "faces" / "notes.txt").write_text("no picture")
    return tmp_path / "faces"


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments), "--max-new-tokens", "3"])


def test_every_question_is_asked_about_every_picture_of_a_folder(
    checkpoint: Path, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (faces / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "p.jsonl"
    command = ("--ckpt", checkpoint, "--images", faces, "--question", "WHO?", "--question", "old?", "--out", out)
    assert predict(*command) == 0
    assert f"10 answers in {out}; 2 of them have none, see their field 'error'" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["0.png", "1.png", "2.png", "broken.png", "more/0.JPG"]
    assert [line["id"] for line in lines] == [name for start in names for name in (start, f"{start}#2")]
    assert "not readable as a picture" in lines[6]["error"]
    session = ChatSession(load_assistant(str(checkpoint)))
    session.set_image(open_image(faces / "1.png"))
    assert lines[2]["question"] == "WHO?"
    assert session.ask("WHO?", GenerateOptions(max_new_tokens=3)) == lines[2]["answer"]
    whole = out.read_text()
    assert predict(*command) == 0 and out.read_text() == whole
    monkeypatch.setattr(loading, "_build", None)  # mixing is refused before weights load
    assert predict(*command, "--temperature", "0.5") == 2
    assert "p.jsonl' belongs to another run: do_sample was 'False', is 'True'" in capsys.readouterr().err


def test_questions_of_a_file_keep_their_ids_and_fields(
    checkpoint: Path, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[dict[str, Any]] = [
        {"id": 7, "image": "0.png", "question": "who?", "label": "nobody"},
        {"images": ["1.png", "more/0.JPG"], "question": "are they alike?"},
        {"question": "no picture?"},
    ]
    asked, out = tmp_path / "asked.jsonl", tmp_path / "p.jsonl"
    asked.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ("--ckpt", checkpoint, "--questions", asked, "--images", faces, "--out", out, "--batch-size", 2)
    assert predict(*command, "--temperature", 1, "--seed", 5) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["7", "2", "3"]
    assert lines[0]["meta"] == {"label": "nobody"} and "meta" not in lines[1]
    assert lines[1]["images"] == [str(faces / "1.png"), str(faces / "more" / "0.JPG")] and lines[2]["images"] == []
    assert not any("error" in line for line in lines)


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun sets for each of ``count`` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    faces, out, whole = tmp_path / "faces", tmp_path / "p.jsonl", tmp_path / "whole.jsonl"
    draw_pictures(faces, 16)
    options = "--question who? --temperature 2 --seed 3 --batch-size 1 --max-new-tokens 60 --out"
    shared = [sys.executable, "-m", "minigpt4", "predict", "--ckpt", str(checkpoint), "--images", str(faces)]
    command = [*shared, *options.split(), str(out)]
    first, part = subprocess.Popen(command, cwd=REPOSITORY), tmp_path / "p.jsonl.rank0"
    while first.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert not out.exists() and part.read_text().count("\n") % 4 == 0  # batches of 1, windows of 4
    ranks = [subprocess.Popen(command, cwd=REPOSITORY, env=one) for one in environments(2)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert sorted(path.name for path in tmp_path.glob("p.jsonl*")) == ["p.jsonl", "p.jsonl.run.json"]
    subprocess.run([*command[:-1], str(whole)], cwd=REPOSITORY, check=True)
    assert out.read_text() == whole.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "faces"], "write either --question"),
        (["--question", "who?"], "--question needs --images"),
        (["--question", "who?", "--images", "face"], "--images 'face': no such folder"),
        (["--question", "who?", "--images", "empty"], "'empty' holds no pictures (.jpg"),
        (["--questions", "asked.json"], "'asked.json' not found"),
        (["--question", "who?", "--images", "faces", "--batch-size", "many"], "--batch-size must be auto or a whole"),
        (["--question", "who?", "--images", "faces", "--batch-size", "0"], "batch_size must be >= 1, got 0"),
        (["--question", "who?", "--images", "faces", "--num-beams", "2", "--temperature", "1"], "either sampled"),
        (["--question", "who?", "--images", "faces", "--ckpt", "nowhere"], "checkpoint 'nowhere': no such directory"),
        (["--question", "who?", "--images", "faces", "--out", "empty"], "'empty' is a folder, expected a file name"),
    ],
)
def test_a_mistake_is_one_line_before_weights_load(
    checkpoint: Path,
    faces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(loading, "_build", None)
    assert predict("--ckpt", checkpoint, "--out", "p.jsonl", *arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("error: ") == 1 == len(told.splitlines())


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"image": "a.png", "questoin": "x"}], "field 'question' is missing or empty (did you mean 'questoin'?)"),
        ([{"question": "<ImageHere>?"}], "a question must not hold '<ImageHere>'"),
        ([{"question": "x", "image": "a", "images": ["b"]}], "holds both 'image' and 'images'"),
        ([{"question": "x", "image": 3}], "field 'image' holds 3, expected a file name or a list of them"),
        ([{"question": "x", "id": 2}, {"question": "y"}], "two questions have the id '2'"),
        ([], "asked.json: holds no records"),
    ],
)
def test_a_broken_question_file_names_the_record(tmp_path: Path, records: list[Any], message: str) -> None:
    path = tmp_path / "asked.json"
    path.write_text(json.dumps(records))
    with pytest.raises(DataError) as caught:
        questions_of_file(path, None)
    assert message in str(caught.value)


def test_a_missing_folder_of_pictures_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder of pictures"):
        questions_of_folder(tmp_path / "nowhere", ["who?"])
