"""Small registered classes and files, so that configuration is tested without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minigpt4.common.registry import KINDS, registry
from minigpt4.common.schema import DatasetConfig, ModelConfig

REPOSITORY = Path(__file__).resolve().parent.parent

BASE = """model:
  arch: toy
  llama_model: llm_dir
  lora_r: 8
datasets:
  faces:
    build_info: {ann_path: faces.json}
    format: talk
    fields: {question: q}
    batch_size: 2
    on_error: skip
run:
  max_epoch: 2
"""


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """The architecture of these tests has one key of its own."""

    arch: str = "toy"
    toy_layers: int = 2


class Toy:
    Config = ToyConfig


class Flat:
    Config = ModelConfig


class Pairs:
    """A builder whose check looks for its annotation file."""

    Config = DatasetConfig
    seen: list[tuple[DatasetConfig, int, tuple[str, ...]]] = []

    def __init__(self, cfg: DatasetConfig, image: Any, default_prompts: Sequence[str] = ()) -> None:
        self.cfg = cfg
        Pairs.seen.append((cfg, image.size, tuple(default_prompts)))

    def check(self) -> list[str]:
        path = Path(self.cfg.build_info.get("ann_path", ""))
        return [] if path.is_file() else [f"build_info.ann_path: '{path}': no such file"]


class Steady:
    """A runner without a configuration of its own."""


def register_fakes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Only the names of these tests are known, and ``folder`` is the current directory."""
    entries: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    entries["model"] = {"toy": Toy, "minigpt_v2": Flat}
    entries["builder"] = {"annotations": Pairs, "pairs": Pairs}
    entries["format"] = {"talk": object()}
    entries["processor"] = {"eyes": object()}
    entries["task"] = {"pretrain": object(), "image_text_pretrain": object()}
    entries["runner"] = {"steady": Steady, "runner_base": Steady}
    entries["template"] = {"vicuna_v0": object()}
    entries["metric"] = {"exact_accuracy": object(), "rouge_l": object()}
    entries["lr_scheduler"] = {"flat": object(), "linear_warmup_cosine_lr": object()}
    monkeypatch.setattr(registry, "_entries", entries)
    cards = folder / "cards"
    cards.mkdir()
    for name in ("known", "gpt4visionface_detail"):
        text = "builder: pairs\nformat: talk\nbatch_size: 3\nbuild_info: {ann_path: faces.json, extra: {a: 1}}\n"
        (cards / f"{name}.yaml").write_text(text, encoding="utf-8")
    found = {path.stem: path for path in sorted(cards.iterdir())}
    monkeypatch.setattr("minigpt4.common.config.find_card", found.get)
    monkeypatch.setattr("minigpt4.common.config.known_cards", lambda: list(found))
    monkeypatch.chdir(folder)
    Pairs.seen.clear()
    (folder / "llm_dir").mkdir()
    (folder / "faces.json").write_text("[]", encoding="utf-8")


def write(folder: Path, text: str) -> Path:
    """``text`` as face.yaml in ``folder``."""
    path = folder / "face.yaml"
    path.write_text(text, encoding="utf-8")
    return path
