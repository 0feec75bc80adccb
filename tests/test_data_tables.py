"""Parquet files, saved data sets and folders of classes are data sets by YAML alone."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from minigpt4.common.errors import DataError
from minigpt4.common.types import as_floats
from minigpt4.datasets import stored
from minigpt4.datasets.sources import read_sources
from minigpt4.datasets.stored import StoredImage
from tests.data_parts import builder, faces, json_file, png

BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(count: int = 6, **columns: Any) -> Any:
    """Captioned pictures as ``datasets`` writes them: {bytes, path} and a description of the features."""
    images = [{"bytes": png(number * 40), "path": f"{number}.png"} for number in range(count)]
    feature = {"emotion": {"names": ["happy", "sad"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    plain = {
        "image": pa.array(images, BYTES_AND_PATH),
        "caption": pa.array([f"face {number}" for number in range(count)]),
        "emotion": pa.array([number % 2 for number in range(count)], pa.int64()),
    }
    made = pa.table(plain | columns)
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})})


def saved(folder: Path, content: Any, files: int = 2) -> Path:
    """What ``save_to_disk`` leaves: Arrow streams and a state file that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    rows = -(-content.num_rows // files)
    for number, name in enumerate(names):
        part = content.slice(number * rows, rows)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "dataset_info.json").write_text("{}", encoding="utf-8")
    return folder


def parquet(path: Path, content: Any) -> Path:
    pq.write_table(content, path, row_group_size=2)
    return path


@pytest.mark.parametrize("layout", ["parquet", "folder of parquet", "saved", "saved splits", "arrow file"])
def test_pictures_inside_a_table_are_trained_on(tmp_path: Path, layout: str) -> None:
    if layout == "parquet":
        source = parquet(tmp_path / "a.parquet", table())
    elif layout == "folder of parquet":
        source = tmp_path / "parts"
        source.mkdir()
        parquet(source / "train-00000-of-00002.parquet", table().slice(0, 3))
        parquet(source / "train-00001-of-00002.parquet", table().slice(3))
    elif layout == "arrow file":
        source = tmp_path / "a.arrow"
        with pa.ipc.new_file(str(source), table().schema) as writer:
            writer.write_table(table())
    else:
        source = tmp_path / "saved"
        saved(source / ("train" if layout == "saved splits" else ""), table())
        if layout == "saved splits":
            (source / "dataset_dict.json").write_text('{"splits": ["train", "test"]}', encoding="utf-8")
    made = builder("mine", {"build_info": {"ann_path": str(source)}, "prompts": ["Describe."]})
    assert made.check() == []
    dataset = pickle.loads(pickle.dumps(made.build("train")))
    samples = [dataset.sample(0, index, 1) for index in range(6)]
    assert [sample.turns[0].answer for sample in samples] == [f"face {number}" for number in range(6)]
    reds = [float(as_floats(sample.images[0])[0].mean()) for sample in samples]
    assert reds == sorted(reds) and len(set(reds)) == 6


def test_numbers_of_classes_become_their_names(tmp_path: Path) -> None:
    source = saved(tmp_path / "saved", table())
    block = {"build_info": {"ann_path": str(source)}, "fields": {"label": "emotion"}, "prompts": ["Mood?"]}
    dataset = builder("mine", block | {"format": "classification"}).build("train")
    assert [dataset.sample(0, index, 1).turns[0].answer for index in (0, 1, 2)] == ["happy", "sad", "happy"]
    unknown = table(emotion=pa.array([0, -1, 0, 0, 0, 0]))
    source = saved(tmp_path / "unknown", unknown, 1)
    (problem,) = builder("mine", block | {"format": "classification", "build_info": {"ann_path": str(source)}}).check()
    assert "data-00000-of-00001.arrow, row 1: field 'label' holds None" in problem


def test_a_column_may_hold_bytes_or_lists_of_pictures(tmp_path: Path) -> None:
    raw = parquet(tmp_path / "raw.parquet", table(image=pa.array([png(n) for n in range(6)])))
    record = read_sources([raw])[3]
    assert record["image"].read() == png(3)
    for kind, extra in (("pair", {"path": "x.png"}), ("alone", {})):
        cells = [[{"bytes": png(row), **extra}, {"bytes": png(row + 100), **extra}] for row in range(5)] + [None]
        item = BYTES_AND_PATH if extra else pa.struct([("bytes", pa.binary())])
        lists = table(image=pa.array([None] * 6), images=pa.array(cells, pa.list_(item)))
        sources = [parquet(tmp_path / f"{kind}.parquet", lists), saved(tmp_path / kind, lists)]
        for source in sources:
            records = read_sources([source])
            assert [image.read() for image in records[4]["images"]] == [png(4), png(104)]
            assert records[5]["images"] is None


def test_reading_records_leaves_the_pictures_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredImage, "read", lambda _: pytest.fail("read a picture"))
    source = parquet(tmp_path / "a.parquet", table(image=pa.array([{"bytes": bytes(99_999)}] * 6, BYTES_AND_PATH)))
    assert len(pickle.dumps(read_sources([source]))) < 5000


def test_a_picture_in_two_rows_falls_on_one_side(tmp_path: Path) -> None:
    images = pa.array([{"bytes": png(number % 10), "path": "image.png"} for number in range(40)], BYTES_AND_PATH)
    content = pa.table({"image": images, "caption": [str(number % 10) for number in range(40)]})
    source = parquet(tmp_path / "a.parquet", content)
    made = builder("mine", {"build_info": {"ann_path": str(source)}, "val": {"fraction": 0.4}})
    sides = []
    for split in ("train", "val"):
        dataset = made.build(split)
        sides.append({dataset.sample(0, index, 1).turns[0].answer for index in range(len(dataset))})
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10


def test_a_row_that_cannot_be_used_is_named_before_training(tmp_path: Path) -> None:
    images = [{"bytes": png(1), "path": None}] * 5 + [{"bytes": None, "path": "far.png"}]
    source = parquet(tmp_path / "a.parquet", table(image=pa.array(images, BYTES_AND_PATH)))
    (problem,) = builder("mine", {"build_info": {"ann_path": str(source)}}).check()
    assert "a.parquet, row 5: field 'image' holds no picture bytes, and its path 'far.png' leads to no file" in problem
    Image.new("RGB", (4, 4)).save(tmp_path / "far.png")
    assert builder("mine", {"build_info": {"ann_path": str(source)}}).check() == []
    images[5] = {"bytes": b"no picture", "path": None}
    source = parquet(tmp_path / "b.parquet", table(image=pa.array(images, BYTES_AND_PATH)))
    (problem,) = builder("mine", {"build_info": {"ann_path": str(source)}}).check()
    assert "b.parquet, row 5: image 'image of b.parquet, row 5' cannot be read" in problem


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.parquet": b"none"}, "a.parquet: not a readable Parquet file"),
        ({"a.arrow": b"none"}, "a.arrow: not a readable Arrow file"),
        ({"train-0.parquet": b"", "test-0.parquet": b""}, r"files of several splits \(test, train\)"),
        ({"dataset_dict.json": b'{"splits": ["fold_0"]}'}, "holds the splits fold_0; name one: ann_path: .*fold_0"),
        ({"state.json": b'{"_data_files": [{"filename": "x.arrow"}]}'}, "'x.arrow' of state.json not found"),
        ({"state.json": b'{"_indices_data_files": [{}]}'}, "save it after flatten_indices"),
        ({"state.json": b"[]"}, "state.json: expected an object"),
        ({"a.txt": b""}, "is a folder without annotations; expected a sub-folder per class, Parquet files, or"),
    ],
)
def test_a_folder_that_is_no_data_set_says_what_is_wrong(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_sources([tmp_path])


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path / "a.parquet", table())
    stored.open_parquet.cache_clear()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"reading tables needs pyarrow; pip install 'minigptface\[data\]'"):
        read_sources([source])


def test_the_fingerprint_of_a_table_follows_its_content(tmp_path: Path) -> None:
    first = read_sources([parquet(tmp_path / "a.parquet", table())]).fingerprint()
    assert read_sources([tmp_path / "a.parquet"]).fingerprint() == first
    changed = table(caption=pa.array([f"Face {number}" for number in range(6)]))
    assert read_sources([parquet(tmp_path / "a.parquet", changed)]).fingerprint() != first


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two folders of ten pictures each, one of them deeper down."""
    for name, count in (("very_happy", 10), ("sad/by night", 10)):
        (tmp_path / "faces" / name).mkdir(parents=True)
        faces(tmp_path / "faces" / name, count)
    (tmp_path / "faces" / "notes.txt").write_text("x", encoding="utf-8")
    return tmp_path / "faces"


@pytest.mark.parametrize("key", ["ann_path", "image_path"])
def test_a_folder_per_class_is_a_classification(classes: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    made = builder("mine", {"build_info": {key: str(classes)}, "prompts": ["Mood?"], "val": {"fraction": 0.3}})
    with caplog.at_level(logging.INFO):
        assert made.check() == []
        train, val = made.build("train"), made.build("val")
    assert "class folders of 20 records with 'label' -> classification" in caplog.text
    assert "1 files are no pictures inside a class, left out" in caplog.text
    assert len(train) + len(val) == 20 and len(val) > 1
    assert {train.sample(0, index, 1).turns[0].answer for index in range(len(train))} == {"very happy", "sad"}
    assert as_floats(train.sample(0, 0, 1).images[0]).shape == (3, 56, 56)


def test_validation_may_be_a_folder_of_its_own(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "held" / "sad").mkdir(parents=True)
    faces(tmp_path / "held" / "sad", 3)
    block = {
        "build_info": {"ann_path": str(classes)},
        "prompts": ["Mood?"],
        "val": {"ann_path": str(tmp_path / "held")},
    }
    made = builder("mine", block)
    assert made.check() == [] and len(made.build("train")) == 20 and len(made.build("val")) == 3


def test_folders_that_are_no_classes_are_refused(classes: Path) -> None:
    before = read_sources([classes]).fingerprint()
    Image.new("RGB", (4, 4)).save(classes / "very_happy" / "new.png")
    assert read_sources([classes]).fingerprint() != before
    (classes / "angry").mkdir()
    with pytest.raises(DataError, match=r"angry' holds no pictures .*; every folder is a class"):
        read_sources([classes])
    (classes / "angry").rename(classes / "Train")
    with pytest.raises(DataError, match="holds the folder 'Train', which is a split and no class; write ann_path"):
        read_sources([classes])


def test_sections_of_own_data_are_chosen_by_name(tmp_path: Path) -> None:
    content = {name: [{"question": name, "answer": "a"}] for name in ("Age", "Mood", "Skin")}
    info = {"ann_path": json_file(tmp_path / "a.json", content), "sections": ["Mood", "Age"]}
    made = builder("mine", {"data_type": "text", "build_info": info})
    assert made.check() == []
    dataset = made.build("train")
    assert [dataset.sample(0, index, 1).turns[0].prompt for index in range(len(dataset))] == ["Mood", "Age"]
    (problem,) = builder("mine", {"data_type": "text", "build_info": info | {"sections": ["Moods"]}}).check()
    assert "no section 'Moods' (did you mean 'Mood'?)" in problem
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    (problem,) = builder("mine", {"build_info": info | {"ann_path": str(tmp_path / "a.jsonl")}}).check()
    assert "sections are parts of a .json file; '.jsonl' has none" in problem
