"""What reports are told of a record: its pictures, its section and group, and what may make groups of people."""

from __future__ import annotations

from pathlib import Path

from minigpt4.datasets.facts import short_values
from tests.data_parts import builder, faces, json_file


def test_a_record_gives_its_picture_and_what_groups_it(tmp_path: Path) -> None:
    (name,) = faces(tmp_path, 1)
    record = {"image": name, "question": "Who?", "answer": "me", "age": 31, "meta": {"gender": "f", "note": "x" * 50}}
    info = {"ann_path": json_file(tmp_path / "a.json", [record] * 4), "image_path": str(tmp_path)}
    dataset = builder("mine", {"format": "vqa", "build_info": info}).build("train")
    assert dataset.facts(2) == {"images": [str(tmp_path / name)], "meta": {"age": 31, "gender": "f"}}
    (tmp_path / name).unlink()
    assert dataset.facts(2)["images"] == []


def test_section_and_group_come_along(tmp_path: Path) -> None:
    content = {title: [{"question": "q", "answer": "a", "mood": title.lower()}] * 2 for title in ("A", "B")}
    info = {"ann_path": json_file(tmp_path / "a.json", content), "sections": ["A", "B"]}
    block = {"data_type": "text", "format": "vqa", "build_info": info, "balance": {"by": "mood"}}
    dataset = builder("mine", block).build("train")
    assert dataset.facts(3) == {"images": [], "section": "B", "group": "b", "meta": {"mood": "b"}}


def test_lists_and_long_texts_are_no_properties() -> None:
    record = {"id": 3, "answer": "joy", "box": [1, 2], "age": 31, "glasses": False, "story": "x" * 41, "empty": ""}
    assert short_values(record) == {"age": 31, "glasses": False}
