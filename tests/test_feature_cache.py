"""Features on disk: written by many at once, cut off at any byte, and never taken for others."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import DataError
from minigpt4.common.types import as_floats
from minigpt4.datasets.cached_pictures import Wanted, attach
from minigpt4.datasets.feature_cache import (
    DTYPES,
    FeatureStore,
    FeatureWriter,
    MemoryFeatures,
    PictureNames,
    Space,
    clear_space,
    read_spaces,
)
from minigpt4.datasets.map_dataset import MapDataset
from minigpt4.datasets.pictures import content_key, encoded, source_key
from tests.data_parts import builder, faces, json_file, png, tar_file

SPACE = Space((2, 3), "float32", {"weights": "a", "pixels": "b"}, {"vit_model": "tiny"})


def key(number: int) -> bytes:
    return content_key(str(number).encode())


def row(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(6, dtype=torch.float32).view(2, 3) + number).to(dtype)


def fill(root: Path, numbers: range, space: Space = SPACE) -> None:
    store = FeatureStore(root, space)
    for number in numbers:
        if not store.has(key(number)):
            store.add(key(number), row(number, DTYPES[space.dtype]))
    store.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_to_the_bit_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    space = replace(SPACE, dtype=dtype)
    fill(tmp_path, range(5), space)
    store = FeatureStore(tmp_path, space)
    rows = store.rows()
    for number in range(5):
        found = rows(store.place(key(number)))
        assert found.dtype == DTYPES[dtype] and torch.equal(found, row(number, DTYPES[dtype]))
    assert store.place(key(5)) == -1 and len(store) == 5


def test_rows_are_read_by_another_process_that_opens_its_own_files(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    store = FeatureStore(tmp_path, SPACE)
    rows = store.rows()
    assert torch.equal(rows(store.place(key(2))), row(2))
    content = pickle.dumps(rows)
    assert len(content) < 2000  # paths, no rows
    assert torch.equal(pickle.loads(content)(store.place(key(2))), row(2))


def test_memory_and_disk_answer_alike(tmp_path: Path) -> None:
    memory = MemoryFeatures(SPACE)
    memory.add(key(1), row(1))
    assert memory.has(key(1)) and memory.place(key(2)) == -1
    assert torch.equal(memory.rows()(memory.place(key(1))), row(1))


@pytest.mark.parametrize(
    "other",
    [
        replace(SPACE, about={"weights": "c", "pixels": "b"}),
        replace(SPACE, about={"weights": "a", "pixels": "d"}),
        replace(SPACE, dtype="bfloat16"),
        replace(SPACE, shape=(2, 4)),
    ],
)
def test_other_weights_pixels_dtypes_and_shapes_miss(other: Space, tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    assert len(FeatureStore(tmp_path, other)) == 0
    assert len(FeatureStore(tmp_path, replace(SPACE, notes={"vit_model": "moved"}))) == 3


def test_files_are_split_at_their_largest_size(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / SPACE.key, SPACE, shard_bytes=2 * SPACE.row_bytes)
    for number in range(5):
        writer.add(key(number), row(number))
    writer.close()
    store = FeatureStore(tmp_path, SPACE)
    assert len(list(store.folder.glob("*.rows"))) == 3
    rows = store.rows()
    assert all(torch.equal(rows(store.place(key(number))), row(number)) for number in range(5))


def test_two_processes_write_at_once_and_each_sees_both(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=fill, args=(tmp_path, part)) for part in (range(300), range(200, 500))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    store = FeatureStore(tmp_path, SPACE)
    rows = store.rows()
    assert len(store) == 500 and not list(store.damaged())
    assert all(torch.equal(rows(store.place(key(number))), row(number)) for number in range(500))


def write_for_ever(folder: Path) -> None:
    writer = FeatureWriter(folder, SPACE)
    for number in range(10**9):
        writer.add(key(number), row(number))
        if number % 7 == 0:
            writer.commit()


def test_a_writer_killed_at_any_moment_leaves_whole_rows_and_the_next_goes_on(tmp_path: Path) -> None:
    draw, before = Random(3), 0
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path / SPACE.key,))
        process.start()
        time.sleep(draw.uniform(0.05, 0.15))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        store = FeatureStore(tmp_path, SPACE)
        assert store.lost == 0 and len(store) >= before and not list(store.damaged())
        before = len(store)
    assert before > 0
    fill(tmp_path, range(before + 3))
    assert len(FeatureStore(tmp_path, SPACE)) == before + 3


def test_every_cut_of_an_index_leaves_the_whole_records_before_it(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (index,) = (tmp_path / SPACE.key).glob("*.index")
    content = index.read_bytes()
    for size in range(len(content) + 1):
        index.write_bytes(content[:size])
        store = FeatureStore(tmp_path, SPACE)
        assert len(store) == size // (len(content) // 3)


def test_a_file_that_was_cut_off_is_told_and_its_rows_are_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, range(6))
    (rows,) = (tmp_path / SPACE.key).glob("*.rows")
    os.truncate(rows, 4 * SPACE.row_bytes - 1)
    store = FeatureStore(tmp_path, SPACE)
    assert len(store) == 3 and store.lost == 3
    assert "is cut off: 3 pictures are lost" in caplog.text
    fill(tmp_path, range(6))
    again = FeatureStore(tmp_path, SPACE)
    assert len(again) == 6 and again.lost == 0 and not list(again.damaged())


def test_a_changed_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    (path,) = (tmp_path / SPACE.key).glob("*.rows")
    with path.open("r+b") as file:
        file.seek(2 * SPACE.row_bytes + 5)
        file.write(b"\xff")
    assert list(FeatureStore(tmp_path, SPACE).damaged()) == [(path, 2)]


def test_a_space_is_described_and_cleared_alone(tmp_path: Path) -> None:
    other = replace(SPACE, dtype="float16")
    fill(tmp_path, range(2))
    fill(tmp_path, range(2), other)
    assert {space.key for space in read_spaces(tmp_path)} == {SPACE.key, other.key}
    assert clear_space(tmp_path, SPACE.key) > 2 * SPACE.row_bytes
    assert [space.key for space in read_spaces(tmp_path)] == [other.key]
    with pytest.raises(DataError, match="written by another version"):
        (tmp_path / other.key / "space.json").write_text('{"layout": 99}')
        read_spaces(tmp_path)


def test_rows_of_a_cleared_cache_name_what_happened(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    store = FeatureStore(tmp_path, SPACE)
    place, rows = store.place(key(0)), store.rows()
    clear_space(tmp_path, SPACE.key)
    with pytest.raises(DataError, match="was the vision cache cleared"):
        rows(place)


def test_a_place_is_another_one_when_its_file_changes_and_content_is_the_same_anywhere(tmp_path: Path) -> None:
    one, two = tmp_path / "a.png", tmp_path / "b.png"
    one.write_bytes(png(10))
    two.write_bytes(png(10))
    before = source_key(one)
    assert before == source_key(one) and before != source_key(two)
    assert content_key(one.read_bytes()) == content_key(two.read_bytes())
    os.utime(one, (1, 1))
    assert source_key(one) != before


def test_names_are_kept_and_shared(tmp_path: Path) -> None:
    with PictureNames(tmp_path) as names:
        names.put(key(1), key(2))
        assert names.get(key(1)) == key(2)
    assert PictureNames(tmp_path).get(key(1)) == key(2)
    assert PictureNames(None).get(key(1)) is None


def test_tars_and_files_know_their_pictures(tmp_path: Path) -> None:
    members = {f"{i:02d}.{end}": png(i) if end == "png" else b"words" for i in range(3) for end in ("png", "txt")}
    tar_file(tmp_path / "0.tar", members)
    tars = made("captions", {"builder": "shards", "build_info": {"storage": str(tmp_path / "0.tar")}})
    assert [encoded(source) for i in range(3) for source in tars.sources(i)] == [png(0), png(1), png(2)]
    keys = {source_key(source) for i in range(3) for source in tars.sources(i)}
    assert len(keys) == 3


def made(name: str, block: Mapping[str, object]) -> MapDataset:
    dataset = builder(name, block).build("train")
    assert isinstance(dataset, MapDataset)
    return dataset


def annotated(tmp_path: Path, **keys: object) -> MapDataset:
    names = faces(tmp_path, 4)
    records = [{"image": name, "question": "who?", "answer": "me"} for name in (*names, names[0])]
    info = {"ann_path": json_file(tmp_path / "a.json", records), "image_path": str(tmp_path)}
    return made("own", {"format": "vqa", "build_info": info, **keys})


def test_samples_show_features_in_the_place_of_pixels_and_nothing_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = annotated(tmp_path)
    wanted = Wanted()
    shown = wanted.add_dataset(dataset)
    assert len(wanted.pictures) == 4  # the first is shown twice
    expected = [dataset.sample(0, i, 1) for i in range(5)]
    attach(dataset, shown, row, [10, 11, 12, 13], {})
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened a picture"))
    for index, number in enumerate((10, 11, 12, 13, 10)):
        sample = dataset.sample(0, index, 1)
        assert torch.equal(as_floats(sample.images[0]), row(number))
        assert (sample.turns, sample.sample_id) == (expected[index].turns, expected[index].sample_id)


def test_a_picture_that_cannot_be_read_stops_the_run_or_is_passed_over(tmp_path: Path) -> None:
    strict = annotated(tmp_path)
    wanted = Wanted()
    shown = wanted.add_dataset(strict)
    with pytest.raises(DataError, match=r"dataset 'own', .*a\.json.*: broken"):
        attach(strict, shown, row, [0, -1, 2, 3], {1: "broken"})
    lenient = annotated(tmp_path, on_error="skip", max_bad_fraction=0.5)
    attach(lenient, shown, row, [0, -1, 2, 3], {1: "broken"})
    sample = lenient.sample(0, 1, 1)
    assert sample.passed_over[0].index == 1 and torch.equal(as_floats(sample.images[0]), row(2))


def test_formats_still_learn_the_size_of_a_picture(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (100, 50)).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    record = {"image": "a.png", "box": [50, 25, 50, 25], "phrase": "a face"}
    info = {"ann_path": json_file(tmp_path / "a.json", [record]), "image_path": str(tmp_path)}
    dataset = made("boxes", {"format": "refer", "build_info": info})
    before = dataset.sample(0, 0, 1)
    shown = Wanted().add_dataset(dataset)
    attach(dataset, shown, row, [7], {})
    after = dataset.sample(0, 0, 1)
    assert after.turns == before.turns and torch.equal(as_floats(after.images[0]), row(7))


def test_the_fast_backend_makes_the_pixels_that_training_would_see_in_a_space_of_its_own(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (200, 150), Random(1).randbytes(200 * 150 * 3))
    noise.save(tmp_path / "a.jpg")
    record = {"image": "a.jpg", "question": "who?", "answer": "me"}
    info = {"ann_path": json_file(tmp_path / "a.json", [record]), "image_path": str(tmp_path)}
    found = []
    for backend in ("exact", "fast"):
        dataset = made("own", {"format": "vqa", "build_info": info, "image_backend": backend})
        wanted = Wanted()
        wanted.add_dataset(dataset)
        (picture,) = wanted.pictures
        assert torch.equal(picture.pixels(encoded(picture.source)), as_floats(dataset.sample(0, 0, 1).images[0]))
        found.append(picture.preparation)
    assert found[0] != found[1]


def test_streams_do_not_know_their_pictures(tmp_path: Path) -> None:
    tar_file(tmp_path / "0.tar", {"1.png": png(1), "1.txt": b"words"})
    info = {"storage": f"pipe:cat {tmp_path}/0.tar", "samples": 4, "shuffle_buffer": 1}
    stream = made("captions", {"builder": "shards", "build_info": info})
    assert as_floats(stream.sample(0, 0, 1).images[0]).shape == (3, 56, 56)
    with pytest.raises(DataError, match="dataset 'captions', .*does not know its pictures before they are read"):
        Wanted().add_dataset(stream)
