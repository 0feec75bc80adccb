"""A job folder as a run leaves it, written by the run's own trackers and file functions, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from minigpt4.common.logger import JsonlTracker, RunInfo, WindowRecord
from minigpt4.runners.kept_answers import keep_answers

WINDOWS = 12
COMMAND = "python train.py --cfg-path faces.yaml"
CONFIG: dict[str, Any] = {
    "model": {"arch": "no_such_arch", "image_size": 448, "lora_r": 8},
    "datasets": {"faces": {"builder": "no_such_builder", "batch_size": 4, "build_info": {"ann_path": "faces.csv"}}},
    "run": {"init_lr": 1e-4, "seed": 42, "valid": {"metrics": ["loss", "exact_accuracy"]}},
}


def record(window: int, loss: float, is_last: bool = False) -> WindowRecord:
    """A logged window; 1 s long, of which half is the backward pass."""
    return WindowRecord(
        window=window, epoch=0, iteration=window, loss=loss, loss_avg=loss, lr=1e-4 / window, grad_norm=1.5, samples=8,
        target_tokens=40, samples_per_s=8.0, target_tokens_per_s=40.0, data_share=0.1, wait_s=0.1, vision_s=0.1,
        language_s=0.25, backward_s=0.5, optimizer_s=0.05, vision_gb=0.0, language_gb=0.0, backward_gb=0.0,
        optimizer_gb=0.0, memory_gb=3.25, elapsed_s=float(window), eta_s=0.0 if is_last else 5.0, skipped=0,
    )  # fmt: skip


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (300, 200)) -> Path:
    """A picture with a pattern, so that blurring it changes it."""
    image = Image.new("RGB", size, colour)
    for x in range(0, size[0], 10):
        image.paste((0, 0, 0), (x, 0, x + 4, size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def answers(folder: Path, num_right: int, count: int = 24) -> list[dict[str, Any]]:
    """Emotions of ``count`` pictures; the first ``num_right`` are right, the others say joy or something else."""
    labels = ("joy", "fear", "anger")
    rows = []
    for number in range(count):
        reference = labels[number % 3]
        answer = reference if number < num_right else "joy" if reference != "joy" else "a long story"
        rows.append(
            {
                "id": f"faces/{number}", "question": "What does the face express?", "reference": reference,
                "answer": answer, "images": [str(folder / f"{number}.png")], "section": f"part {number % 2}",
                "correct": {"exact_accuracy": answer == reference},
                "meta": {"age": "old" if number % 4 else "young", "emotion": reference, "file": f"{number}.png"},
            }
        )  # fmt: skip
    return rows


def write_job(
    folder: Path,
    rows: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] = CONFIG,
    dataset: str = "faces",
    text: str = "What is it?",
    extra: Mapping[str, Any] | None = None,
    offset: float = 0.0,
) -> Path:
    """log.txt, config.yaml, manifest.json and answers; ``text`` is what a canary is asked and answers."""
    folder.mkdir(parents=True)
    tracker = JsonlTracker()
    tracker.start(RunInfo(folder, f"{folder.parent.name}/{folder.name}", config, WINDOWS, 0, 1))
    for window in range(1, WINDOWS + 1):
        tracker.log(record(window, 2.0 / window + offset, window == WINDOWS))
        if window % 4 == 0:
            tracker.metrics(window, {f"val_loss/{dataset}": 1.0 / window, "val_loss": 1.0 / window})
            said = {"source": "canary 1", "question": text, "reference": "", "answer": f"{text} {window}"}
            tracker.answers(window, [said])
    manifest = {
        "command": COMMAND, "started": "2026-01-01T12:00:00+0000", "git": "abc", "versions": {"torch": "2.6.0"},
        "device": "cpu", "world_size": 1, "arch": "minigpt_v2", "window": WINDOWS,
        "data": {dataset: {"samples": 1234, "sample_ratio": 3.0, "batch_size": 4, "fingerprint": "0123456789abcdef"}},
        "load_report": [{"source": "vit.safetensors", "parts": {"visual_encoder": {"loaded": 56}}, "remarks": []}],
        "bad_records": {}, **(extra or {}),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    state = {"window": WINDOWS, "best": 1 / 12, "best_by": "loss", "best_window": 12, "is_over": False}
    step = folder / "checkpoints" / f"step_{WINDOWS}"
    (step / "resume").mkdir(parents=True)
    (step / "resume" / "state.json").write_text(json.dumps(state))
    (step / "manifest.json").write_text(json.dumps({**manifest, "step": WINDOWS}))
    for link in ("last", "best"):
        (folder / "checkpoints" / link).symlink_to(step.name)
    if rows:
        keep_answers(folder, WINDOWS, {dataset: rows}, is_best=True)
    return folder


class Page(HTMLParser):
    """What a browser sees: tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._hidden = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag if tag in ("style", "script") else self._hidden

    def handle_endtag(self, tag: str) -> None:
        self._hidden = "" if tag == self._hidden else self._hidden

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self._texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self._texts)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)
