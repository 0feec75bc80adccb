"""Records that cannot be read are passed over, counted once over workers, epochs and resumes, and bounded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.common.dist import single
from minigpt4.common.errors import DataError
from minigpt4.common.schema import Config, DatasetConfig
from minigpt4.common.types import BadRecord
from minigpt4.runners.progress import Progress
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import tiny_config


def _config(folder: Path, broken: int, limit: float, **run: Any) -> Config:
    """Twelve pictures on disk, the last ``broken`` of which are no pictures."""
    torch.set_num_threads(1)
    rows = "image,question,answer\n"
    for number in range(12):
        path = folder / f"{number}.png"
        if number < 12 - broken:
            Image.new("RGB", (4, 4), (20 * number, 0, 0)).save(path)
        else:
            path.write_bytes(b"not a picture")
        rows += f"{number}.png,say {number},abc\n"
    (folder / "faces.csv").write_text(rows, encoding="utf-8")
    faces = DatasetConfig(
        name="faces", format="vqa", batch_size=3, on_error="skip", max_bad_fraction=limit,
        build_info={"ann_path": str(folder / "faces.csv"), "image_path": str(folder)},
    )  # fmt: skip
    return replace(tiny_config(folder / "output", **run), datasets={"faces": faces})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_picture_is_counted_once_and_named_in_the_manifest(tmp_path: Path, num_workers: int) -> None:
    cfg = _config(tmp_path, broken=1, limit=0.1, num_workers=num_workers)
    runner = RunnerBase(cfg, single("cpu"))
    assert runner.train() == 0  # 48 samples: four passes over the set
    for path in (runner.job_dir / "manifest.json", runner.job_dir / "checkpoints" / "last" / "manifest.json"):
        bad = json.loads(path.read_text())["bad_records"]
        assert bad["faces"]["count"] == 1
        assert "faces.csv, line 13" in bad["faces"]["examples"][0] and "11.png" in bad["faces"]["examples"][0]
    resumed = RunnerBase(replace(cfg, run=replace(cfg.run, max_epoch=3, resume_ckpt_path="auto")), single("cpu"))
    assert list(resumed.progress.bad_records["faces"]) == [11]
    assert resumed.train() == 0 and len(resumed.progress.bad_records["faces"]) == 1


def test_more_broken_records_than_allowed_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 12 samples cannot be read, max_bad_fraction 0.1 allows"):
        RunnerBase(_config(tmp_path, broken=2, limit=0.1), single("cpu")).train()


def test_the_limit_holds_for_all_workers_together(tmp_path: Path) -> None:
    runner = RunnerBase(_config(tmp_path, broken=1, limit=0.1), single("cpu"))
    runner.progress.add_bad([BadRecord("faces", 3, "what another worker met")])
    with pytest.raises(DataError, match="2 of 12 records could not be read, .* allows 1; for example what another"):
        runner.train()


def test_ranks_add_up_and_messages_stay_few() -> None:
    progress = Progress()
    progress.add_bad(BadRecord("one", index, f"line {index}") for index in (*range(7), 3))
    progress.merge_bad([progress.bad_records, {"one": {6: "line 6", 9: "line 9"}, "two": {0: "line 0"}}])
    summary = progress.bad_summary()
    assert (summary["one"]["count"], summary["two"]["count"]) == (8, 1)
    assert summary["one"]["examples"] == [f"line {index}" for index in range(5)]
