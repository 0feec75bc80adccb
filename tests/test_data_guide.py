"""The guide to own data: every file it shows is written as shown, every block is loaded as shown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from minigpt4.common.registry import registry
from tests.data_parts import builder, png, tar_file
from tests.test_data_tables import saved, table

README = Path(__file__).resolve().parent.parent / "dataset" / "README_YOUR_DATA.md"


def fenced() -> Iterator[tuple[str, str, str]]:
    """Kind and content of every fenced block, and the file name in front of it, if there is one."""
    before = ""
    parts = README.read_text(encoding="utf-8").split("```")
    for number, part in enumerate(parts):
        if number % 2 == 0:
            before = part
            continue
        kind, _, content = part.partition("\n")
        named = re.findall(r"`(my_data/[^`]+\.(?:csv|jsonl?))`", before)
        yield kind, textwrap.dedent(content), named[-1] if named else ""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All files of the guide, in the current directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_data"
    (folder / "images").mkdir(parents=True)
    (folder / "shards").mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / f"000{number}.png")
    for kind, content, name in fenced():
        if kind in ("csv", "json"):
            assert name, f"the guide does not say which file this is: {content}"
            Path(name).write_text(content, encoding="utf-8")
        elif kind == "python":
            exec(compile(content, str(README), "exec"), {})
        elif kind == "text":
            for line in content.splitlines():
                if re.fullmatch(r"my_data/classes/\S+\.png", line):
                    Path(line).parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8)).save(line)
    saved(folder / "saved", table())
    for number in range(13):
        tar_file(folder / "shards" / f"{number:05d}.tar", {"a.jpg": png(number), "a.txt": b"A face"})
    return folder


def blocks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, content, _ in fenced():
        if kind == "yaml" and "build_info" in content:
            for name, block in yaml.safe_load(content)["datasets"].items():
                assert name not in found, f"{name} is in the guide twice"
                found[name] = block
    return found


def test_every_block_of_the_guide_works(data: Path) -> None:
    assert len(blocks()) == 16
    for name, block in blocks().items():
        made = builder(name, block)
        assert made.check() == [], name
        dataset = made.build("train")
        dataset.groups()
        for index in range(len(dataset)):
            assert all(turn.answer for turn in dataset.sample(0, index, 1).turns)


def test_the_guide_shows_what_it_says(data: Path) -> None:
    def turns(name: str, index: int) -> list[tuple[str, str]]:
        sample = builder(name, blocks()[name]).build("train").sample(0, index, 1)
        return [(turn.prompt.replace("<Img><ImageHere></Img>", "[]").strip(), turn.answer) for turn in sample.turns]

    assert turns("my_faces", 1) == [("[] What does this face express?", "anger")]
    assert turns("my_classes", 3)[0][1] == "very sad"
    assert turns("my_conversations", 0)[1] == ("How old is he?", "About thirty.")
    assert turns("my_conversations", 1) == [("Is [] the man of [] ?".replace("] ?", "]?"), "Yes.")]
    assert turns("my_messages", 0) == [("[] You describe faces. Who is this?", "A man who laughs.")]
    assert turns("my_messages", 1) == [("[] What does  show?", "A man who frowns.")]
    assert turns("my_parquet", 1) == [("[] Describe this face.", "The face 0002.png.")]
    assert turns("my_saved", 1)[0][1] == "sad"
    assert turns("my_boxes", 0)[0][1] == "{<25><37><37><62>}"


def test_the_guide_names_every_format_for_own_data() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(registry.names("format")) - {"unnatural_instruction"} == listed - {"format"}
