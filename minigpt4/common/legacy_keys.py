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
        "device_8bit": "quantised weights go to the device of the run; chat takes --gpu-id",
        "has_qformer": "this architecture has no Q-Former",
        "freeze_qformer": "this architecture has no Q-Former",
        "num_query_token": "this architecture has no Q-Former",
        "q_former_model": "this architecture has no Q-Former",
    },
    "run": {
        "rank": "the launcher (torchrun, SLURM) sets it",
        "gpu": "the launcher (torchrun, SLURM) sets it",
        "dist_backend": "nccl on GPUs, gloo on CPUs",
        "world_size": "the launcher (torchrun, SLURM) sets it",
        "use_dist_eval_sampler": "every held-out sample is measured once, on one of the ranks",
        "train_splits": "every data set trains; what is held out is named by datasets.X.val",
        "test_splits": "what is held out is named by datasets.X.val; test sets belong to evaluation scripts",
    },
}
DROPPED_IN_DATASETS = {
    "type": "a data set has one variant",
    "vis_processor.image_size": "it is model.image_size",
    "vis_processor.min_scale": "pictures are not cropped",
    "vis_processor.max_scale": "pictures are not cropped",
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


def drop_unused_in_datasets(source: Source, image_size: int | None, problems: Problems) -> None:
    """The same for blocks of data sets, one warning per key. A value that would change a run is refused instead.

    ``image_size``: that of the model; None when the model has mistakes of its own.
    """
    dropped: dict[str, list[str]] = {}
    blocks = source.data.get("datasets")
    for name, block in blocks.items() if isinstance(blocks, dict) else ():
        place = f"datasets.{name}"
        if not isinstance(block, dict):
            continue
        if "type" in block:
            if (value := block.pop("type")) != "default":
                problems.add(source.where(f"{place}.type"), f"{place}.type", f"found '{value}', allowed: default")
            dropped.setdefault("type", []).append(f"{place}.type")
        for split, processor in _processors(block):
            for key in ("image_size", "min_scale", "max_scale"):
                if key not in processor:
                    continue
                full, value = f"{place}.vis_processor.{split}.{key}", processor.pop(key)
                if key == "image_size" and image_size and value not in (0, image_size):
                    message = f"found {value}, but model.image_size is {image_size}; remove this key"
                    problems.add(source.where(full), full, message)
                dropped.setdefault(f"vis_processor.{key}", []).append(full)
    for key, places in dropped.items():
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        _warn(source, places[0], f"ignored{more}: {DROPPED_IN_DATASETS[key]}")


def _processors(block: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    group = block.get("vis_processor")
    splits = group.items() if isinstance(group, dict) else ()
    return [(str(split), processor) for split, processor in splits if isinstance(processor, dict)]


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
    if "wandb_log" in run:
        _upgrade_wandb_log(source, run, problems)
    if "valid_splits" in run:
        del run["valid_splits"]
        hint = "what is held out is named by datasets.X.val, what is measured on it by run.valid"
        _warn(source, "run.valid_splits", f"ignored: {hint}")


def _upgrade_wandb_log(source: Source, run: dict[str, Any], problems: Problems) -> None:
    is_on = run.pop("wandb_log")
    trackers = run.get("trackers", ["terminal", "jsonl"])
    if not isinstance(is_on, bool):
        problems.add(source.where("run.wandb_log"), "run.wandb_log", f"found {is_on!r}, expected true or false")
    if is_on is True and isinstance(trackers, list) and "wandb" not in trackers:
        run["trackers"] = [*trackers, "wandb"]
        source.move("run.wandb_log", "run.trackers")
    shown = ", ".join(map(str, trackers if "trackers" not in run else run["trackers"]))
    _warn(source, "run.wandb_log", f"read as run.trackers: [{shown}]")


def _warn(source: Source, key: str, message: str) -> None:
    log.warning("%s: %s: %s", source.where(key), key, message)
