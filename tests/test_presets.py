"""The shipped presets fit the cards they are named after, according to the planner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minigpt4 import catalog
from minigpt4.common.config import load_config
from minigpt4.common.schema import Config, RunConfig
from minigpt4.tools.planner.estimate import Estimate, Planner, usable_bytes
from minigpt4.tools.planner.lengths import Assumed, find_rows
from minigpt4.tools.planner.skeleton import configured_variant, language_model_files
from tests.config_fakes import REPOSITORY

PRESETS = REPOSITORY / "train_configs" / "presets"
CARDS = (8, 12, 24, 40, 80)
SLOW = pytest.mark.slow


def config_with(preset: str, folder: Path) -> Config:
    """A run that includes a preset by one line and fills its rows."""
    catalog.load()
    faces = {"format": "vqa", "build_info": {"ann_path": "faces.csv", "image_path": "."}, "batch_size": 16}
    model = {"arch": "minigpt_v2", "model_type": "pretrain", "llama_model": "weights/llama", "end_sym": "</s>"}
    content = {"model": model, "datasets": {"faces": faces}, "run": {"accum_grad_iters": 4}}
    path = folder / "run.yaml"
    path.write_text(f"include: presets/{preset}.yaml\n{yaml.safe_dump(content)}", encoding="utf-8")
    return load_config(path, check_data=False, check_weights=False)


def estimate_of(cfg: Config) -> Estimate:
    """At 7B, 448 px, answers of 250 tokens."""
    with language_model_files(cfg, "llama2-7b") as known:
        planner = Planner(known, on_gpu=True)
        variant = configured_variant(known, on_gpu=True)
        *_, row = find_rows(known, planner.skeleton(variant), Assumed(None, 250, can_encode=False), gpus=1)
        return planner.estimate(variant, row)


@pytest.mark.parametrize("card", [8, *(pytest.param(card, marks=SLOW) for card in CARDS[1:])])
def test_a_preset_fits_its_card_and_says_what_it_takes(card: int, tmp_path: Path) -> None:
    estimate = estimate_of(config_with(f"{card}gb", tmp_path))
    assert estimate.row.shape.positions == 537 and estimate.row.packed
    assert estimate.verdict(card) == "fits"
    assert estimate.total > 0.8 * usable_bytes(card)  # the card is used
    shown = f"{estimate.total / 1e9:.1f}"
    (line,) = [line for line in (PRESETS / f"{card}gb.yaml").read_text().splitlines() if "<- this file" in line]
    assert shown in line.split()


def test_every_card_has_a_preset_and_every_preset_loads(tmp_path: Path) -> None:
    assert {path.name for path in PRESETS.iterdir()} == {f"{card}gb.yaml" for card in CARDS}
    rows = []
    for card in CARDS:
        cfg = config_with(f"{card}gb", tmp_path)
        assert cfg.model.load_in_4bit == (card < 24)
        changed = replace(cfg.run, row_tokens=4096, recompute="none", packing="auto", accum_grad_iters=1)
        assert changed == RunConfig()  # presets decide nothing but memory
        rows.append(cfg.run.row_tokens)
    assert rows == sorted(rows)
