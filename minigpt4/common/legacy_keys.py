"""Keys of MiniGPT-4, MiniGPT-v2 and the first MiniGPTFace: what each of them means today.

A key that a config class declares is never touched. Every upgrade says so in one warning line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from minigpt4.common.errors import nearest
from minigpt4.common.yaml_source import Problems, Source, owner_hint

log = logging.getLogger(__name__)

SECTIONS = ("model", "datasets", "run", "evaluation_datasets")

DROPPED_SECTIONS = {
    "preprocess": "processors are chosen per data set, and the image size is model.image_size",
    "env": "relative paths start at the current directory, the YAML file or the repository root",
}
DROPPED = {
    "model": {
        "prompt": "it never had an effect",
        "load_finetuned": "model.ckpt alone decides which weights are loaded",
        "load_pretrained": "model.ckpt alone decides which weights are loaded",
        "finetuned": "use model.ckpt",
        "pretrained": "use model.ckpt",
        "has_qformer": "this architecture has no Q-Former",
        "freeze_qformer": "this architecture has no Q-Former",
        "num_query_token": "this architecture has no Q-Former",
        "q_former_model": "this architecture has no Q-Former",
    },
    "run": {
        "rank": "the launcher (torchrun, SLURM) sets it",
        "gpu": "the launcher (torchrun, SLURM) sets it",
        "dist_backend": "nccl on GPUs, gloo on CPUs",
    },
}
RENAMED = {"model": {"llm": "llama_model", "init_from": "ckpt"}}
RENAMED_DATASETS = {"gpt4affectnet": "gpt4visionface_detail", "shregptdataset": "sharegpt_detail"}


def upgrade_sections(source: Source, is_dataset: Callable[[str], bool], problems: Problems) -> None:
    """Root keys, names of data sets and ``run``/``model`` aliases, in place. ``is_dataset``: has a card of its own."""
    for section, reason in DROPPED_SECTIONS.items():
        if source.data.pop(section, None) is not None:
            _warn(source, section, f"ignored: {reason}")
    for section in [name for name in source.data if name not in SECTIONS]:
        del source.data[section]
        problems.add(source.where(section), section, _unknown_section(section))
    for section, names in RENAMED.items():
        for old, new in names.items():
            _rename(source, section, old, new, problems)
    for old, new in RENAMED_DATASETS.items():
        if not is_dataset(old):
            _rename(source, "datasets", old, new, problems)
    run = source.data.get("run")
    if isinstance(run, dict):
        _upgrade_run(source, run, problems)


def drop_unused(source: Source, section: str, content: dict[str, Any], declared: Collection[str]) -> None:
    """Removes keys of ``section`` that once existed, mean nothing now, and that no field of ``declared`` takes."""
    for key, reason in DROPPED.get(section, {}).items():
        if key in content and key not in declared:
            del content[key]
            _warn(source, f"{section}.{key}", f"ignored: {reason}")


def _unknown_section(section: str) -> str:
    hint = nearest(section, SECTIONS) or owner_hint(section)
    return f"unknown section{hint}; allowed: {', '.join(SECTIONS)}"


def _rename(source: Source, section: str, old: str, new: str, problems: Problems) -> None:
    content = source.data.get(section)
    if not isinstance(content, dict) or old not in content:
        return
    if new in content:
        key = f"{section}.{old}"
        problems.add(source.where(key), key, f"another name of '{new}', which is given too; keep one")
        del content[old]
        return
    _warn(source, f"{section}.{old}", f"read as {section}.{new}")
    source.move(f"{section}.{old}", f"{section}.{new}")
    renamed = {new if key == old else key: value for key, value in content.items()}  # data sets keep their order
    content.clear()
    content.update(renamed)


def _upgrade_run(source: Source, run: dict[str, Any], problems: Problems) -> None:
    if "amp" in run:
        amp = run.pop("amp")
        if not isinstance(amp, bool):
            problems.add(source.where("run.amp"), "run.amp", f"found {amp!r}, expected true or false")
        precision = "auto" if amp else "fp32"
        if "precision" in run:
            _warn(source, "run.amp", "ignored: run.precision is given")
        else:
            run["precision"] = precision
            source.move("run.amp", "run.precision")
            _warn(source, "run.amp", f"read as run.precision: {precision}")
    trackers = run.get("trackers", ["terminal", "jsonl"])
    if run.get("wandb_log") is True and isinstance(trackers, list) and "wandb" not in trackers:
        run["trackers"] = [*trackers, "wandb"]
        source.move("run.wandb_log", "run.trackers")
        _warn(source, "run.wandb_log", f"read as run.trackers: [{', '.join(map(str, run['trackers']))}]")


def _warn(source: Source, key: str, message: str) -> None:
    log.warning("%s: %s: %s", source.where(key), key, message)
