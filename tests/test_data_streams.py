"""Streamed tars: no sample twice among workers and ranks, broken ones by name, a new order after a resume."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from minigpt4.common.errors import DataError
from minigpt4.common.types import IMAGE_TAG, Turn
from minigpt4.datasets import collate
from minigpt4.datasets.sampler import WindowSampler
from minigpt4.datasets.streams import expand_addresses
from tests.data_parts import builder, png, tar_file

PER_SHARD = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of six samples; captions are their numbers."""
    for shard in range(4):
        members = {}
        for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            members |= {
                f"{number:03d}.png": png(number),
                f"{number:03d}.json": json.dumps({"caption": str(number)}).encode(),
            }
        tar_file(tmp_path / f"{shard:05d}.tar", members)
    return tmp_path


def block(folder: Path, **keys: Any) -> dict[str, Any]:
    storage = f"pipe:cat {folder}/{{00000..00003}}.tar"
    return {"builder": "shards", "build_info": {"storage": storage, "samples": 24, "shuffle_buffer": 8}, **keys}


@pytest.fixture(autouse=True)
def ids_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenizer is needed to see which samples a window holds."""

    def padded(samples: Any, encoder: Any) -> list[str]:
        return [sample.turns[0].answer for sample in samples]

    monkeypatch.setattr(collate, "collate_padded", padded)


def windows(dataset: Any, rank: int = 0, world_size: int = 1, seed: int = 1) -> collate.WindowDataset:
    sampler = WindowSampler([len(dataset)], [1.0], [2], 1, world_size, rank, seed)
    encoder: Any = None
    return collate.WindowDataset([dataset], sampler, encoder, "padded", 0, seed)


def answers(data: collate.WindowDataset, numbers: range, workers: int = 0) -> list[str]:
    loader: Any = DataLoader(data, batch_size=None, sampler=numbers, num_workers=workers)
    return [answer for window in loader for batch in window for answer in batch]


ALL = Counter(str(number) for number in range(24))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_holds_every_sample_once(folder: Path, workers: int) -> None:
    made = builder("mine", block(folder))
    assert made.check() == []
    found = answers(windows(made.build("train")), range(12), workers)
    assert Counter(found) == ALL
    assert found != sorted(found, key=int)


def test_two_ranks_with_two_workers_share_the_shards_out(folder: Path) -> None:
    found: list[str] = []
    for rank in range(2):
        found += answers(windows(builder("mine", block(folder)).build("train"), rank, 2), range(6), 2)
    assert Counter(found) == ALL


def test_workers_that_outnumber_the_shards_share_their_samples(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = {"storage": f"pipe:cat {folder}/00000.tar", "samples": 6, "shuffle_buffer": 1}
    found: list[str] = []
    for rank in range(3):
        found += answers(windows(builder("mine", block(folder, build_info=one)).build("train"), rank, 3), range(1))
    assert Counter(found) == Counter(str(number) for number in range(6))
    assert "1 shards for 3 loader workers" in caplog.text


def test_the_same_seed_gives_the_same_order_and_another_one_does_not(folder: Path) -> None:
    def order(seed: int, numbers: range) -> list[str]:
        return answers(windows(builder("mine", block(folder)).build("train"), seed=seed), numbers)

    assert order(1, range(12)) == order(1, range(12)) != order(2, range(12))


def test_a_resumed_stream_is_shuffled_anew_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = answers(windows(builder("mine", block(folder)).build("train")), range(12))
    assert "shuffled anew" not in caplog.text
    resumed = answers(windows(builder("mine", block(folder)).build("train")), range(6, 18))
    assert Counter(resumed) == ALL and resumed not in (whole, whole[12:] + whole[:12])
    assert "from window 6 on it is shuffled anew" in caplog.text


def test_a_stream_is_mixed_with_other_sets_by_ratio(folder: Path) -> None:
    stream: Any = builder("mine", block(folder)).build("train")
    tar_file(folder / "own.tar", {"a.png": png(1), "a.txt": b"local"})
    local: Any = builder("own", {"builder": "shards", "build_info": {"storage": str(folder / "own.tar")}}).build(
        "train"
    )
    encoder: Any = None
    sampler = WindowSampler([len(stream), len(local)], [3.0, 1.0], [1, 1], 1, 1, 0, 5)
    found = answers(collate.WindowDataset([stream, local], sampler, encoder, "padded", 0, 5), range(200))
    assert 0.15 < found.count("local") / len(found) < 0.35


def test_surveys_read_the_front_and_leave_the_stream_alone(folder: Path) -> None:
    dataset: Any = builder("mine", block(folder)).build("train")
    assert [dataset.sample(0, index, 1).turns for index in (0, 5, 0)] == [
        (Turn(IMAGE_TAG, text),) for text in ("0", "5", "0")
    ]
    assert Counter(answers(windows(dataset), range(12), 2)) == ALL


def broken(folder: Path) -> None:
    """A picture that is none, a shard cut in the middle, one that is no tar, and a command that fails."""
    tar_file(folder / "00000.tar", {"x.png": b"no picture", "x.txt": b"bad", "y.png": png(1), "y.txt": b"0"})
    content = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(content[: content.index(b"009.png") + 600])
    (folder / "00002.tar").write_bytes(b"no tar at all" * 100)
    (folder / "00003.tar").unlink()


def test_broken_members_and_shards_are_skipped_counted_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken(folder)
    info = {"storage": f"pipe:cat {folder}/{{00000..00003}}.tar", "samples": 24, "shuffle_buffer": 1}
    made = builder("mine", block(folder, build_info=info, on_error="skip", max_bad_fraction=0.6))
    dataset: Any = made.build("train")
    found = answers(windows(dataset), range(4))
    assert set(found) == {"0", "6", "7", "8"}
    text = caplog.text
    assert "skipped (1 so far in this process)" in text and "skipped (4 so far in this process)" in text
    assert dataset._num_bad >= 4


def test_broken_samples_travel_with_the_sample_that_took_their_place(folder: Path) -> None:
    broken(folder)
    info = {"storage": f"pipe:cat {folder}/00000.tar", "samples": 2, "shuffle_buffer": 1}
    dataset: Any = builder("mine", block(folder, build_info=info, on_error="skip", max_bad_fraction=0.6)).build("train")
    windows(dataset)[0]
    sample = dataset.sample(0, 0, 1)
    assert sample.turns[0].answer == "0"
    assert "00000.tar, sample x: image 'x' cannot be read" in sample.passed_over[0].message


def test_a_broken_member_stops_a_strict_run_by_name(folder: Path) -> None:
    info = {"storage": f"pipe:cat {folder}/00001.tar", "samples": 24, "shuffle_buffer": 1}
    made = builder("mine", block(folder, build_info=info))
    data = windows(made.build("train"))
    broken(folder)
    (problem,) = made.check()
    assert "00001.tar" in problem
    with pytest.raises(DataError, match=r"dataset 'mine', .*00001\.tar"):
        answers(data, range(4))


def test_a_dead_stream_stops_a_run_that_skips(folder: Path) -> None:
    made = builder("mine", block(folder, on_error="skip", max_bad_fraction=0.01))
    data = windows(made.build("train"))
    for shard in folder.glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match="11 of 11 samples and shards read here are broken"):
        answers(data, range(1))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"storage": "pipe:cat x.tar"}, "build_info.samples: a stream cannot be counted"),
        ({"storage": "pipe:false", "samples": 9}, "build_info.storage: dataset 'mine': shard 'pipe:false'"),
        ({"storage": "pipe:cat {9..1}.tar", "samples": 9}, "a range reads"),
        ({"storage": ["pipe:cat x.tar", "nowhere.tar"], "samples": 9}, "1 of 2 shards not found"),
    ],
)
def test_mistakes_of_a_stream_are_found_before_training(info: dict[str, Any], message: str) -> None:
    problems = builder("mine", {"builder": "shards", "build_info": info}).check()
    assert len(problems) == 1 and message in problems[0]


def test_ranges_are_written_out_and_s3_becomes_a_pipe() -> None:
    assert expand_addresses(["https://host/{08..10}.tar", "s3://b/{0..1}.tar"]) == [
        "https://host/08.tar",
        "https://host/09.tar",
        "https://host/10.tar",
        "pipe:aws s3 cp s3://b/0.tar -",
        "pipe:aws s3 cp s3://b/1.tar -",
    ]
    assert expand_addresses("pipe:ls | awk '{print}'") == ["pipe:ls | awk '{print}'"]


def test_the_first_record_of_a_stream_tells_its_format(folder: Path) -> None:
    record = {"question": "Who?", "answer": "Ann"}
    tar_file(folder / "qa.tar", {"a.jpg": png(1), "a.json": json.dumps(record).encode()})
    info = {"storage": f"pipe:cat {folder}/qa.tar", "samples": 1}
    made = builder("mine", block(folder, format="auto", build_info=info))
    assert made.check() == []
    dataset: Any = made.build("train")
    assert dataset.sample(0, 0, 1).turns[0].answer == "Ann"


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads addresses through curl")
def test_shards_of_a_web_server_are_streamed(folder: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        storage = f"http://127.0.0.1:{server.server_port}/{{00000..00003}}.tar"
        far = builder("far", {**block(folder), "build_info": {"storage": storage, "samples": 24}}).build("train")
        found = answers(windows(far), range(12))
        server.shutdown()
    assert Counter(found) == ALL
