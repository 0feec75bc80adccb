"""A short alignment run on the shipped backbones learns from the pictures, through train.py's own code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt4 import catalog
from minigpt4.chat.loading import load_assistant
from minigpt4.cli import train
from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.logger import read_log
from minigpt4.common.schema import ProcessorConfig, SplitProcessors
from minigpt4.common.types import Batch, Sample
from minigpt4.datasets.builders.shards import ShardsBuilder
from minigpt4.datasets.collate import collate_padded
from minigpt4.processors.base import ImageSpec

ROOT = Path(__file__).resolve().parents[1]


def draw(folder: Path, seed: int, count: int) -> Path:
    """Shards of ``count`` faces with captions; other seeds give other faces."""
    flags = ["--seed", str(seed), "--train", str(count), "--test", "100", "--align", "1", "--out", str(folder)]
    subprocess.run([sys.executable, str(ROOT / "dataset/draw_faces.py"), *flags], check=True, capture_output=True)
    return folder / "shards"


def read_shards(folder: Path, count: int) -> list[Sample]:
    words = SplitProcessors(train=ProcessorConfig(name="blip_caption"))
    cfg = ShardsBuilder.Config(
        name="held_out",
        builder="shards",
        format="caption",
        build_info={"storage": str(folder)},
        text_processor=words,
        process_text=["answers"],
    )
    dataset = ShardsBuilder(cfg, ImageSpec(64)).build("train")
    return [dataset.sample(0, index, 0) for index in range(count)]


def mean_loss(model: torch.nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float(model(batch).loss_sum) / batch.num_target_tokens


def test_a_short_alignment_run_learns_from_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKSTART", str(tmp_path))
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)
    catalog.load()
    shards = "datasets.cc_sbu.build_info.storage=" + str(draw(tmp_path / "data", 7, 600))
    options = [shards, "run.iters_per_epoch=60", "run.num_workers=0", "run.trackers=[jsonl]"]
    assert train(str(ROOT / "train_configs/quickstart_stage1.yaml"), options) == 0
    checkpoint = read_checkpoint(tmp_path / "jobs/quickstart_stage1")
    losses = [row["loss"] for row in read_log(checkpoint.path.parents[1] / "log.txt") if "loss" in row]
    assert losses[-1] < 0.4 * losses[0]
    assistant = load_assistant(str(checkpoint.path))
    unseen = read_shards(draw(tmp_path / "unseen", 8, 100), 64)
    batch = collate_padded(unseen, assistant.model.encoder)
    seen = mean_loss(assistant.model, batch)
    batch.images = torch.zeros_like(batch.images)
    assert seen < 0.7 * mean_loss(assistant.model, batch)  # the captions come from the pictures, not by heart
