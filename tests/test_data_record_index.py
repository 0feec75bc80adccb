"""Large JSON lists and lines and tables are read through an index, and nobody can tell the difference."""

from __future__ import annotations

import csv
import io
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch.utils.data import DataLoader

from minigpt4.common.errors import DataError
from minigpt4.datasets import annotations as annotations_module
from minigpt4.datasets import json_lists, record_index, splits
from minigpt4.datasets.annotations import Annotations, joined, read_annotations
from tests.data_parts import builder, faces

PIECES = (
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    '\\"',
    ",",
    ":",
    "\n",
    "\r\n",
    "\t",
    "ü",
    "字",
    "😀",
    "\u2028",
    "é",
    " ",
    "a",
    "\x85",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of any size count as large."""
    monkeypatch.setattr(annotations_module, "INDEXED_FROM", 0)


def value(rng: Random, depth: int = 3) -> Any:
    """Anything JSON holds, with text that looks like JSON."""
    kind = rng.randrange(7 if depth else 5)
    if kind < 2:
        return "".join(rng.choices(PIECES, k=rng.randrange(9)))
    if kind < 5:
        return (rng.randrange(-9, 10**9), None, rng.random())[kind - 2]
    items = [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return items if kind == 5 else {f"{number}{rng.choice(PIECES)}": item for number, item in enumerate(items)}


def records(rng: Random, count: int) -> list[dict[str, Any]]:
    return [{"id": number, **{rng.choice("abc"): value(rng) for _ in range(3)}} for number in range(count)]


def lines(rng: Random, content: list[dict[str, Any]], end: str) -> str:
    return "".join(
        json.dumps(record, ensure_ascii=rng.random() < 0.5) + end * rng.choice((1, 1, 2)) for record in content
    )


def table(rng: Random, delimiter: str, end: str) -> str:
    """Cells of anything, in quotes; some rows are followed by an empty line."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(["id", "ü b", "c"])
    for number in range(rng.randrange(1, 20)):
        cells = ["".join(rng.choices((*PIECES, ";", "\r"), k=rng.randrange(9))) for _ in range(2)]
        writer.writerow([number, *cells])
        stream.write(end * rng.randrange(2))
    return stream.getvalue()


def layouts(rng: Random) -> dict[str, str]:
    """Every layout that has an index, by the name of its file."""
    content = records(rng, rng.randrange(2, 30))
    pretty = json.dumps(content, indent=1, ensure_ascii=False)
    return {
        "compact.json": json.dumps(content, separators=(",", ":")),
        "plain.json": json.dumps(content, ensure_ascii=False) + "\n",
        "pretty.json": pretty,
        "crlf.json": pretty.replace("\n", "\r\n"),
        "mark.json": "\ufeff" + pretty,
        "lines.jsonl": lines(rng, content, "\n"),
        "crlf.jsonl": "\ufeff\r\n" + lines(rng, content, "\r\n"),
        "open.jsonl": "  \n" + json.dumps(content[0]),
        "lines.json": "\ufeff" + lines(rng, content, "\n"),
        "comma.csv": table(rng, ",", "\n"),
        "crlf.csv": "\ufeff" + table(rng, ",", "\r\n"),
        "decimal.csv": table(rng, ";", "\r\n"),
        "old.csv": table(rng, ",", "\r"),
        "tab.tsv": table(rng, "\t", "\n") + "\n\n",
    }


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode())
    return path


def index_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.index")


def told(annotations: Annotations) -> dict[str, Any]:
    """Everything a reader can see, without the folder."""
    every = range(len(annotations))
    return {
        "records": list(annotations),
        "one by one": [annotations[index] for index in every],
        "last": annotations[-1],
        "where": [Path(annotations.where(index)).name for index in every],
        "sections": [annotations.section(index) for index in every],
        "shape": (annotations.layout, annotations.shape, annotations.root),
        "fingerprint": annotations.fingerprint(),
    }


@pytest.mark.parametrize("seed", range(12))
def test_an_index_changes_nothing_that_is_read(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "_CHUNK", Random(seed).choice((1, 13, 256, 1 << 20)))
    monkeypatch.setattr(record_index, "_BLOCK", 1 + seed)
    texts = layouts(Random(seed))
    plain = {name: read_annotations([written(tmp_path / "plain" / name, text)]) for name, text in texts.items()}
    monkeypatch.setattr(annotations_module, "INDEXED_FROM", 0)
    for name, text in texts.items():
        path = written(tmp_path / "indexed" / name, text)
        first = read_annotations([path])
        assert index_of(path).is_file(), name
        annotations_module._read.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(record_index, "_scan", lambda *_: pytest.fail("looked for the records again"))
            later = read_annotations([path])
        assert told(plain[name]) == told(first) == told(later) == told(pickle.loads(pickle.dumps(later))), name


@pytest.mark.usefixtures("indexed")
def test_indexed_files_are_joined_and_filtered_with_their_places(tmp_path: Path) -> None:
    paths = [
        written(tmp_path / "a.json", json.dumps([{"n": 0}, {"n": 1}])),
        written(tmp_path / "b.csv", "n,m\n2,x\n3,x\n"),
        written(tmp_path / "c.jsonl", '{"n": 4}\n\n{"n": 5}\n'),
    ]
    whole = read_annotations(paths)
    assert [int(record["n"]) for record in whole] == list(range(6))
    kept = whole.filtered(lambda record: int(record["n"]) % 2 == 1)
    assert [int(record["n"]) for record in kept] == [1, 3, 5] and kept.fingerprint() == whole.fingerprint()
    places = [Path(kept.where(index)).name for index in range(3)]
    assert places == ["a.json, record 1", "b.csv, line 3", "c.jsonl, line 3"]
    again = joined([kept, read_annotations(paths[:1])])
    assert [Path(again.where(index)).name for index in (0, 2, 4)] == [places[0], places[2], "a.json, record 1"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[]"),
        ("a.json", '[{"a": 1},\n{"a": }]'),
        ("a.json", '[{"a": 1},\n{"a": 2}'),
        ("a.json", '[{"a": 1}]\n[2]'),
        ("a.json", '[{"a": 1}, 7]'),
        ("a.json", '{"a": 1}\n{"a"'),
        ("a.json", '{"a": 1}\n7\n'),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1} x\n'),
        ("a.jsonl", '{"a": 1}\n[]\n'),
        ("a.jsonl", "\n\n"),
        ("a.csv", "a,b\n1,2\n3\n"),
        ("a.csv", "a,b\n1,2,3\n"),
        ("a.csv", "a,a\n1,2\n"),
        ("a.csv", 'a,b\n1,"2'),
        ("a.csv", "a,b\n"),
    ],
)
def test_mistakes_are_told_as_without_an_index(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(DataError) as plain:
        read_annotations([path])
    monkeypatch.setattr(annotations_module, "INDEXED_FROM", 0)
    with pytest.raises(DataError) as caught:
        read_annotations([path])
    assert str(caught.value) == str(plain.value) and not index_of(path).exists()


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.json", '{"annotations": [{"a": 1}]}', [{"a": 1}]),
        ("a.json", '{"1.png": "x"}\n', [{"image": "1.png", "text": "x"}]),
        ("a.json", '{"7":\n{"a": 1}}', [{"id": "7", "a": 1}]),
        ("a.json", '\n[{"a": 1}]', [{"a": 1}]),
        ("a.jsonl", '{"a": 1}\r{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    ],
)
def test_other_layouts_are_read_whole(name: str, text: str, found: list[Any], tmp_path: Path) -> None:
    path = written(tmp_path / name, text)
    assert list(read_annotations([path])) == found and not index_of(path).exists()


def test_small_files_get_no_index(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"a": 1}]')
    read_annotations([path])
    assert not index_of(path).exists()


@pytest.mark.usefixtures("indexed")
def test_a_changed_file_is_indexed_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n')
    first = read_annotations([path])
    fingerprint = first.fingerprint()
    written(path, '{"a": 1,  "b": [3]}')
    assert list(read_annotations([path])) == [{"a": 1, "b": [3]}]
    written(path, '{"a": 3}\n{"a": 4}\n')  # of the first one's size
    os.utime(path, ns=(0, 7))
    later = read_annotations([path])
    assert list(later) == [{"a": 3}, {"a": 4}] and later.fingerprint() != fingerprint


@pytest.mark.usefixtures("indexed")
def test_a_garbled_index_is_made_again(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", json.dumps([{"a": number} for number in range(9)]))
    read_annotations([path])
    good = index_of(path).read_bytes()
    start = good.index(b"\n") + 1
    flipped = bytes([good[start + 20] ^ 1])
    for content in (
        b"",
        b"7\n",
        b"\xff" * 99,
        good[:-1],
        good[:start],
        good[: start + 20] + flipped + good[start + 21 :],
    ):
        index_of(path).write_bytes(content)
        annotations_module._read.cache_clear()
        assert [record["a"] for record in read_annotations([path])] == list(range(9))
        assert index_of(path).read_bytes() == good


@pytest.mark.usefixtures("indexed")
def test_a_read_only_folder_is_indexed_in_the_users_cache_or_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "data" / "a.json", '[{"a": 1}, {"a": 2}]')
    write, refused = Path.write_bytes, [path.parent]

    def refuse(target: Path, content: bytes) -> int:
        if target.parent in refused:
            raise PermissionError(13, "read-only", str(target))
        return write(target, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    cached = told(read_annotations([path]))
    (kept,) = (tmp_path / "cache").rglob("*.index")
    assert not index_of(path).exists()
    kept.unlink()
    refused.append(kept.parent)
    annotations_module._read.cache_clear()
    with caplog.at_level(logging.INFO):
        in_memory = read_annotations([path])
    assert told(in_memory) == told(pickle.loads(pickle.dumps(in_memory))) == cached
    assert "kept in memory" in caplog.text and not list(tmp_path.rglob("*.index"))


@pytest.mark.usefixtures("indexed")
def test_forked_and_spawned_workers_read_the_same_records(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", json.dumps([{"a": "ü" * number} for number in range(40)]))
    read = read_annotations([path])
    expected = list(read)
    loader: DataLoader[Any] = DataLoader(read, batch_size=3, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    assert [record for batch in loader for record in batch] == expected
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(read.__getitem__, range(40)) == expected


def test_a_killed_write_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"a": 1}]')
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from minigpt4.datasets.record_index import index_records\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "index_records(Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not index_of(path).exists() and list(tmp_path.glob(".a.json.index.*.part"))
    found = record_index.index_records(path)
    assert found is not None and list(found) == [{"a": 1}] and index_of(path).exists()


@pytest.mark.usefixtures("indexed")
def test_a_table_that_changes_under_a_run_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "a,b\n1,2\n3,4\n")
    read = read_annotations([path])
    with path.open("r+") as stream:
        stream.write('a,b\n1;2\n"')
    for index in range(2):
        with pytest.raises(DataError, match="changed while it was in use"):
            read[index]


@pytest.mark.usefixtures("indexed")
def test_a_file_that_changes_under_a_run_is_an_error_with_the_place(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"caption": "x"}\n{"caption": "y"}\n')
    dataset = builder("mine", {"data_type": "text", "format": "text", "build_info": {"ann_path": str(path)}}).build(
        "train"
    )
    with path.open("r+") as stream:
        stream.write("#" * 16)
    with pytest.raises(DataError, match=r"a.jsonl, line 1: '.*a.jsonl' changed while it was in use"):
        dataset.sample(0, 0, 1)
    os.truncate(path, 20)
    with pytest.raises(DataError, match=r"a.jsonl, line 2: 'a.jsonl': 3 of 17 bytes at 17"):
        dataset.sample(0, 1, 1)


@pytest.mark.usefixtures("indexed")
def test_a_long_scan_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_index, "_TOLD_EVERY", -1.0)
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n')
    with caplog.at_level(logging.INFO):
        read_annotations([path])
    assert "looking for its records, 50 %" in caplog.text and "2 records indexed in" in caplog.text


def test_checks_splits_and_balance_are_those_of_the_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = faces(tmp_path, 20)
    content = [{"image": name, "caption": f"face {name}", "age": number % 3} for number, name in enumerate(names)]
    path = written(tmp_path / "a.json", json.dumps(content))
    block = {
        "format": "caption",
        "build_info": {"ann_path": str(path), "image_path": str(tmp_path)},
        "val": {"fraction": 0.3, "group_by": "image"},
        "balance": {"by": "age"},
    }

    def seen() -> Any:
        made = builder("mine", block)
        assert made.check() == []
        sets = [made.build(split) for split in ("train", "val")]
        samples = [[each.sample(0, index, 1) for index in range(len(each))] for each in sets]
        ids = [[(sample.sample_id, sample.turns) for sample in each] for each in samples]
        return ids, [each.fingerprint() for each in sets], sets[0].groups()

    plain = seen()
    monkeypatch.setattr(annotations_module, "INDEXED_FROM", 0)
    annotations_module._read.cache_clear()
    by_index = seen()
    assert index_of(path).exists()
    assert by_index[:2] == plain[:2]
    assert by_index[2].names == plain[2].names and (by_index[2].of_record == plain[2].of_record).all()


def held_out(path: Path, **val: Any) -> list[str]:
    block = {"format": "vqa", "build_info": {"ann_path": str(path), "image_path": str(path.parent)}}
    made = builder("mine", {**block, "val": {"fraction": 0.4, **val}}).build("val")
    return [made.sample(0, index, 1).sample_id for index in range(len(made))]


def test_hashes_of_a_split_are_kept_and_belong_to_one_content_and_one_setting(
    tmp_path: Path, indexed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        {"id": str(n), "image": name, "person": n // 3, "question": "who?", "answer": "me"}
        for n, name in enumerate(faces(tmp_path, 12))
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    by_image, by_person = held_out(path), held_out(path, group_by="person")
    assert 0 < len(by_image) < 12 and by_image != by_person
    with monkeypatch.context() as patch:
        patch.setattr(splits, "_hashes", lambda *given: pytest.fail("hashed again"))
        assert held_out(path) == by_image and held_out(path, group_by="person") == by_person
        assert held_out(path, fraction=0.9) != by_image  # the share is no part of what is kept
    records[0]["image"], records[1]["image"] = records[1]["image"], records[0]["image"]
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    swapped = {"mine/0": "mine/1", "mine/1": "mine/0"}  # the picture decides, not the record
    assert sorted(held_out(path)) == sorted(swapped.get(name, name) for name in by_image)
    assert ("mine/0" in by_image) != ("mine/1" in by_image)  # else the swap shows nothing
