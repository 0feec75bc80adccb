"""Tar files on disk are read by index; broken ones are left out by name."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from minigpt4.common.errors import DataError
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, Turn, as_floats
from minigpt4.datasets.shards import expand_shards, index_shard
from tests.data_parts import builder, png, tar_file


def pair(key: str, caption: str, colour: int = 0) -> dict[str, bytes]:
    meta = json.dumps({"caption": caption, "key": key}).encode()
    return {f"{key}.png": png(colour), f"{key}.txt": b"not this one", f"{key}.json": meta}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards with five samples: the last two are plain text, in capitals and in a folder."""
    tar_file(tmp_path / "00000.tar", pair("000", "A red bus.", 10) | pair("001", "Two dogs", 20))
    tar_file(tmp_path / "00001.tar", pair("002", "A pier", 30))
    tar_file(tmp_path / "00002.tar", {"a/x.PNG": png(40), "a/x.txt": b"Text\n", "b/x.jpg": png(50), "b/x.txt": b"B"})
    return tmp_path


def shards(folder: Path, **keys: Any) -> Any:
    return builder("mine", {"builder": "shards", "build_info": {"storage": f"{folder}/{{00000..00002}}.tar"}, **keys})


def test_captions_come_from_json_or_text_in_the_order_of_the_tars(folder: Path) -> None:
    made = shards(folder)
    assert made.check() == []
    dataset = made.build("train")
    samples = [dataset.sample(0, index, 1) for index in range(len(dataset))]
    assert [sample.turns for sample in samples] == [
        (Turn(IMAGE_TAG, caption),) for caption in ("A red bus.", "Two dogs", "A pier", "Text", "B")
    ]
    assert [float(as_floats(sample.images[0])[0, 0, 0]) for sample in samples] == sorted(
        float(as_floats(sample.images[0])[0, 0, 0]) for sample in samples
    )
    assert samples[2].sample_id == "mine/00001.tar/002" and dataset.where(3) == "00002.tar, sample x"


def test_the_laion_card_cleans_captions(folder: Path) -> None:
    dataset = builder("laion", {"build_info": {"storage": str(folder)}}).build("train")
    assert dataset.sample(0, 0, 1).turns == (Turn(IMAGE_TAG, "a red bus"),)


def test_the_json_of_a_shard_may_be_a_record_of_any_format(tmp_path: Path) -> None:
    record = {"q": "Who?", "answer": "Ann"}
    tar_file(tmp_path / "0.tar", {"a.jpg": png(1), "a.json": json.dumps(record).encode()})
    made = builder(
        "mine",
        {"builder": "shards", "format": "auto", "build_info": {"storage": str(tmp_path)}, "fields": {"question": "q"}},
    )
    assert made.check() == []
    assert made.build("train").sample(0, 0, 1).turns == (Turn(f"{IMAGE_PROMPT} Who? ", "Ann"),)


def test_patterns_globs_folders_and_lists_name_the_same_shards(folder: Path) -> None:
    paths = [folder / f"0000{number}.tar" for number in range(3)]
    for storage in (
        f"{folder}/{{00000..00002}}.tar",
        f"{folder}/0000{{0,1,2}}.tar",
        f"{folder}/*.tar",
        str(folder),
        [str(paths[0]), f"{folder}/0000[12].tar"],
    ):
        assert expand_shards(storage) == paths


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("{folder}/{00000..00004}.tar", "2 of 5 shards not found, the first one: '.*00003.tar'"),
        ("{folder}/{4..1}.tar", "a range reads"),
        ("{folder}/*.tgz", "matches no tar file"),
    ],
)
def test_shards_that_are_not_there_are_found_before_training(folder: Path, storage: str, message: str) -> None:
    storage = storage.replace("{folder}", str(folder))
    with pytest.raises(DataError, match=message):
        expand_shards(storage)
    problems = builder("mine", {"builder": "shards", "build_info": {"storage": storage}}).check()
    assert len(problems) == 1 and problems[0].startswith("build_info.storage: ")


def test_the_index_is_made_once_per_version_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = folder / "00000.tar"
    first = index_shard(tar)
    assert first.path == folder / ".00000.tar.index" and first.count == 2
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("read the tar again"))
        assert index_shard(tar) == first
    os.utime(tar, ns=(0, 0))
    tar_file(tar, pair("9", "new"))
    assert index_shard(tar).count == 1
    assert not list(folder.glob("*.part"))


def test_a_damaged_index_is_made_again(folder: Path) -> None:
    first = index_shard(folder / "00000.tar")
    for content in (b"", b"not json\n", first.path.read_bytes()[:-1]):
        first.path.write_bytes(content)
        assert index_shard(folder / "00000.tar") == first


def test_a_read_only_folder_is_indexed_in_the_users_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = Path.write_bytes

    def refuse(path: Path, content: bytes) -> int:
        if path.parent == folder:
            raise PermissionError(13, "read-only", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    index = index_shard(folder / "00001.tar")
    assert index.path.is_relative_to(tmp_path / "cache")
    assert index_shard(folder / "00001.tar") == index


def test_broken_members_and_cut_files_are_left_out_with_a_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = tar_file(tmp_path / "0.tar", pair("000", "good") | {"001.png": png(1)} | {"002.json": b"{}"})
    assert (index_shard(alone).count, index_shard(alone).bad) == (1, 2)
    cut = tar_file(tmp_path / "1.tar", pair("000", "good") | {"001.txt": b"x", "001.png": b"p" * 5000})
    content = cut.read_bytes()
    cut.write_bytes(content[: content.rindex(b"ppp") - 2000])
    assert index_shard(cut).count == 1 and "'001.png' is cut off" in index_shard(cut).example
    damaged = tar_file(tmp_path / "2.tar", pair("000", "good") | pair("001", "lost"))
    content = damaged.read_bytes()
    place = content.index(b"001.png")
    damaged.write_bytes(content[:place] + b"\xff" * 512 + content[place + 512 :])
    assert index_shard(damaged).count == 1 and f"damaged header at byte {place}" in index_shard(damaged).example
    (tmp_path / "3.tar").write_bytes(b"no tar at all" * 100)
    with caplog.at_level(logging.WARNING):
        dataset = builder("mine", {"builder": "shards", "build_info": {"storage": str(tmp_path)}}).build("train")
    assert len(dataset) == 3
    assert "broken samples left out, for example 0.tar: sample '001' has png" in caplog.text.replace("/001", "001")


def test_a_picture_that_cannot_be_decoded_is_skipped_or_named(tmp_path: Path) -> None:
    tar_file(tmp_path / "0.tar", {"000.jpg": b"no picture", "000.txt": b"a"} | pair("001", "good"))
    block = {"builder": "shards", "build_info": {"storage": str(tmp_path)}}
    with pytest.raises(DataError, match=r"dataset 'mine', 0.tar, sample 000: image '000' cannot be read"):
        builder("mine", block).build("train").sample(0, 0, 1)
    skipping = builder("mine", block | {"on_error": "skip", "max_bad_fraction": 0.5}).build("train")
    assert skipping.sample(0, 0, 1).turns[0].answer == "good"


def test_shards_without_samples_are_an_error(tmp_path: Path) -> None:
    tar_file(tmp_path / "0.tar", {"readme.md": b"hello"})
    made = builder("mine", {"builder": "shards", "build_info": {"storage": str(tmp_path)}})
    assert "1 shards hold no sample" in made.check()[0]


def test_a_shard_data_set_travels_to_loader_workers(folder: Path) -> None:
    dataset = shards(folder).build("train")
    dataset.sample(0, 0, 1)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.sample(0, 4, 1).turns == dataset.sample(0, 4, 1).turns
    assert copy.fingerprint() == dataset.fingerprint()


def test_many_shards_do_not_exhaust_open_files(tmp_path: Path) -> None:
    for number in range(140):
        tar_file(tmp_path / f"{number:03d}.tar", {"a.png": png(number), "a.txt": str(number).encode()})
    dataset: Any = builder("mine", {"builder": "shards", "build_info": {"storage": str(tmp_path)}}).build("train")
    assert [dataset.sample(0, index, 1).turns[0].answer for index in range(140)] == [str(n) for n in range(140)]
    assert len(dataset._files._open) <= 128


def test_a_thousand_samples_are_indexed_in_a_moment(tmp_path: Path) -> None:
    members = {f"{number:05d}.{ending}": b"x" * 500 for number in range(1000) for ending in ("jpg", "txt")}
    tar = tar_file(tmp_path / "0.tar", members)
    begin = time.perf_counter()
    assert index_shard(tar).count == 1000
    assert time.perf_counter() - begin < 5  # a tenth of a second on an idle core
