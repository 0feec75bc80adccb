"""Files become records that know their place; mistakes name file, found and allowed."""

from __future__ import annotations

import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from minigpt4.common.errors import DataError
from minigpt4.datasets import json_lists
from minigpt4.datasets.annotations import read_annotations
from minigpt4.datasets.json_lists import stream_list


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


RECORDS = [{"id": 1, "q": "a"}, {"id": 2, "q": "ü\nb"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", RECORDS),
        ("object.json", {"info": {}, "annotations": RECORDS}),
        ("data.json", {"dataset_name": "x", "data": RECORDS}),
        ("lines.jsonl", "\n".join(json.dumps(record) for record in RECORDS) + "\n\n"),
        ("lines.json", "\n".join(json.dumps(record) for record in RECORDS)),
    ],
)
def test_records_are_read_from_every_layout(tmp_path: Path, name: str, content: Any) -> None:
    annotations = read_annotations([written(tmp_path, name, content)])
    assert list(annotations) == RECORDS
    assert annotations[-1] == RECORDS[1]
    with pytest.raises(IndexError):
        annotations[2]


def test_csv_rows_are_read_with_quotes_and_line_numbers(tmp_path: Path) -> None:
    text = '\ufeffimage,q,label\na.png,"who,\nme",x\nb.png,y,z\n'
    annotations = read_annotations([written(tmp_path, "f.csv", text)])
    assert list(annotations) == [
        {"image": "a.png", "q": "who,\nme", "label": "x"},
        {"image": "b.png", "q": "y", "label": "z"},
    ]
    assert annotations.where(0).endswith("f.csv, line 3") and annotations.where(1).endswith("f.csv, line 4")


@pytest.mark.parametrize(("name", "text"), [("f.csv", "a;b\n1;2\n"), ("f.tsv", "a\tb\n1\t2\n")])
def test_tables_with_semicolons_and_tabs_are_read(tmp_path: Path, name: str, text: str) -> None:
    assert list(read_annotations([written(tmp_path, name, text)])) == [{"a": "1", "b": "2"}]


def test_a_mapping_of_paths_to_text_becomes_image_and_text(tmp_path: Path) -> None:
    annotations = read_annotations([written(tmp_path, "m.json", {"a/1.png": "Happy, ...", "2.png": "Sad"})])
    assert annotations.layout == "mapping"
    assert annotations[1] == {"image": "2.png", "text": "Sad"}


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_a_long_list_is_read_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [{"id": n, "text": "ü, ] }" * n} for n in range(20)]
    monkeypatch.setattr(json_lists, "_CHUNK", size)
    assert list(stream_list(io.StringIO(json.dumps(content, indent=1)))) == content
    assert list(stream_list(io.StringIO("\n[]\n"))) == []
    for text, message, line in (
        ('[{},\n{"a"', "Expecting", 2),
        ('[{"a": 1}] [2]', "Extra data", 1),
        ('{"a": []}', "a list", 1),
    ):
        with pytest.raises(json.JSONDecodeError, match=message) as caught:
            list(stream_list(io.StringIO(text)))
        assert caught.value.lineno == line


def test_records_under_their_ids_keep_them(tmp_path: Path) -> None:
    annotations = read_annotations([written(tmp_path, "d.json", {"07": {"question": "a"}, "08": {"id": 1}})])
    assert list(annotations) == [{"id": "07", "question": "a"}, {"id": 1}]
    assert annotations.where(1).endswith("d.json, entry 1")


def test_records_that_are_filtered_keep_their_places(tmp_path: Path) -> None:
    paths = [
        written(tmp_path, name, [{"n": first}, {"n": first + 1}]) for name, first in (("a.json", 0), ("b.json", 2))
    ]
    kept = read_annotations(paths).filtered(lambda record: record["n"] in (1, 3))
    assert list(kept) == [{"n": 1}, {"n": 3}] and kept.paths == paths
    assert kept.where(0).endswith("a.json, record 1") and kept.where(1).endswith("b.json, record 1")


def test_sections_are_taken_in_the_order_asked_for_and_matched_without_spaces(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", {"A ": [{"id": 1}], "B": [{"id": 2}, {"id": 3}], "C": [{"id": 4}]})
    annotations = read_annotations([path], ["B", " A"])
    assert [record["id"] for record in annotations] == [2, 3, 1]
    assert annotations.where(1).endswith("s.json, section 'B', record 1")


@pytest.mark.parametrize(
    ("sections", "message"),
    [(["Bx"], r"no section 'Bx' \(did you mean 'B'\?\)|no section 'Bx'; known: A, B, C"), (["C"], "section 'C' holds")],
)
def test_an_unknown_or_broken_section_is_an_error(tmp_path: Path, sections: list[str], message: str) -> None:
    path = written(tmp_path, "s.json", {"A": [{"id": 1}], "B": [], "C": {"a": 1}})
    with pytest.raises(DataError, match=message):
        read_annotations([path], sections)
    with pytest.raises(DataError, match=r"the chosen sections \(B\) hold no records"):
        read_annotations([path], ["B"])


def test_a_file_with_sections_is_never_read_whole(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", {"Race": [{"id": 1}], "Gender": [{"id": 2}]})
    with pytest.raises(
        DataError, match=r"holds sections \(Race, Gender\); choose some: build_info: \{sections: \[Race\]\}"
    ):
        read_annotations([path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", [], "holds no records"),
        ("b.json", "[{", "b.json, line 1: not valid JSON"),
        ("b.json", '[{"a": 1},\n{"a": }]', "b.json, line 2: not valid JSON"),
        ("b.json", '[{"a": 1}]\n[{"a": 1}]', "b.json, line 1: found a list, expected an object"),
        ("c.json", {"images": 1}, "found an object with the keys 'images', allowed: a list of records"),
        ("d.json", [{"a": 1}, 7], "d.json, record 1: found a number, expected an object"),
        ("e.jsonl", '{"a": 1}\n{"a"', "e.jsonl, line 2: not valid JSON"),
        ("f.csv", "a,b\n1,2\n3\n", "f.csv, line 3: the row does not have 2 values"),
        ("g.csv", "a,a\n1,2\n", "g.csv, line 1: column names must be unique"),
        ("h.txt", "x", "has the ending '.txt', allowed: .json, .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        read_annotations([written(tmp_path, name, content)])


def test_a_missing_file_gets_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path, "faces.json", RECORDS)
    with pytest.raises(DataError, match=r"facs.json' not found \(did you mean 'faces.json'\?\)"):
        read_annotations([tmp_path / "facs.json"])
    with pytest.raises(DataError, match="is a directory"):
        read_annotations([tmp_path])


def test_several_files_are_joined_and_keep_their_places(tmp_path: Path) -> None:
    paths = [written(tmp_path, "a.json", RECORDS), written(tmp_path, "b.jsonl", '\n{"id": 3}')]
    annotations = read_annotations(paths)
    assert [record["id"] for record in annotations] == [1, 2, 3]
    assert annotations.where(0).endswith("a.json, record 0") and annotations.where(2).endswith("b.jsonl, line 2")


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", [{"id": 1}])
    first = read_annotations([path]).fingerprint()
    assert read_annotations([path]).fingerprint() == first
    written(tmp_path, "a.json", [{"id": 2}])
    assert read_annotations([path]).fingerprint() != first
    assert read_annotations([path])[0] == {"id": 2}


def test_a_hundred_thousand_records_are_read_in_seconds_and_stay_small(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWho is it?"}, {"from": "gpt", "value": "Someone who smiles. " * 5}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": talk} for n in range(100_000)]
    path = written(tmp_path, "big.json", records)
    begin = time.perf_counter()
    annotations = read_annotations([path])
    assert time.perf_counter() - begin < 10  # about one second on an idle core
    assert annotations[77_777] == records[77_777]
    assert len(pickle.dumps(annotations)) < 400 * len(records)
