"""From a configuration to splits that can be looked at; what cannot be opened becomes a finding."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.config import PlannedImage
from minigpt4.common.errors import ConfigError, DataError, MiniGPT4Error, nearest
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, DatasetConfig, ModelConfig
from minigpt4.conversation.encoding import Encoder
from minigpt4.datasets.builders.annotations import AnnotationInfo, AnnotationsBuilder
from minigpt4.datasets.builders.faces import SectionInfo
from minigpt4.datasets.map_dataset import MapDataset
from minigpt4.datasets.streams import StreamDataset
from minigpt4.runners.parts import build_model, default_prompts
from minigpt4.tools.doctor.examine import Finding, Split

log = logging.getLogger(__name__)

_DECODED = 256
"""Pictures per split that are decoded whole, unless all are asked for."""


@dataclass(frozen=True)
class Wishes:
    """sample: records per split, 0 = all. decode: all pixels of every picture. compare: look for leaks."""

    sample: int = 0
    decode: bool = False
    compare: bool = True


@dataclass
class Opened:
    """splits in the order of the file; findings: split title -> what kept a data set, or a part, from being opened."""

    splits: list[Split] = field(default_factory=list)
    findings: dict[str, list[Finding]] = field(default_factory=dict)


def open_splits(cfg: Config, wishes: Wishes) -> Opened:
    """Every split that ``cfg`` trains or validates on. Raises ConfigError with one line per mistake of the file."""
    image, prompts = PlannedImage(cfg.model.image_size), default_prompts(cfg.model)
    used = {name: item for name, item in cfg.datasets.items() if item.sample_ratio != 0}
    builders = {name: registry.get("builder", item.builder)(item, image, prompts) for name, item in used.items()}
    problems = [line for name, builder in builders.items() for line in _block_problems(name, builder)]
    if not used:
        problems.append("datasets: is empty, or every sample_ratio is 0; nothing to look at")
    if problems:
        raise ConfigError("\n".join(problems))
    opened = Opened()
    is_held_out = any(_has_val(item) for item in used.values())
    for name, builder in builders.items():
        for split in ("train", "val") if _has_val(used[name]) else ("train",):
            _open(opened, builder, split, replace(wishes, compare=wishes.compare and is_held_out))
    return opened


def _has_val(cfg: DatasetConfig) -> bool:
    return cfg.val.fraction > 0 or bool(cfg.val.ann_path)


def _block_problems(name: str, builder: Any) -> list[str]:
    """Mistakes of the YAML block: keys, placeholders, files and folders that are not there."""
    problems: list[str] = builder.check_block() if hasattr(builder, "check_block") else []
    if not problems and isinstance(builder, AnnotationsBuilder):
        root = builder.image_root()
        if root and not Path(root).is_dir():
            problems = [f"'{root}' is no folder; pictures are looked for in it"]
        for split in ("train", "val") if _has_val(builder.cfg) else ("train",):
            try:
                missing = [path for path in builder.ann_paths(split) if not path.exists()]
            except DataError as error:
                problems.append(str(error))
            else:
                problems += [f"'{path}' not found" for path in missing]
    return [f"datasets.{name}: {line}" for line in dict.fromkeys(problems)]


def _open(opened: Opened, builder: Any, split: str, wishes: Wishes) -> None:
    title = builder.cfg.name if split == "train" else f"{builder.cfg.name} ({split})" if hasattr(builder, "cfg") else ""
    found = opened.findings.setdefault(title, [])
    try:
        builder = _with_known_sections(builder, split, found)
        dataset = builder.build(split)
    except MiniGPT4Error as error:
        found.append(Finding("annotations", -1, str(error)))
        return
    if not isinstance(dataset, MapDataset):
        found.append(Finding("not-examined", -1, f"builder {builder.cfg.builder} makes a {type(dataset).__name__}"))
        return
    if isinstance(dataset, StreamDataset):  # the same few samples from its front would be seen again and again
        found.append(Finding("not-examined", -1, "a stream is read in training only; its first samples are readable"))
        return
    chosen = spread(len(dataset), wishes.sample)
    stride = 1 if wishes.decode else max(1, len(chosen) // _DECODED)
    opened.splits.append(Split(dataset, split, chosen, stride, wishes.compare))


def spread(size: int, sample: int) -> Sequence[int]:
    """``sample`` indices spread evenly over ``size``; all of them for 0 and for more than there are."""
    return range(size) if not 0 < sample < size else [place * size // sample for place in range(sample)]


def _with_known_sections(builder: Any, split: str, found: list[Finding]) -> Any:
    """A builder without the sections its file does not hold; they are reported. Others stay as they are."""
    info = builder.info() if isinstance(builder, AnnotationsBuilder) else None
    wanted = builder.sections() if isinstance(info, AnnotationInfo) else []
    if not wanted:
        return builder
    known = _section_names(builder.ann_paths(split))
    if known is None:
        return builder
    for name in wanted:
        if name not in known:
            message = f"'{name}'{nearest(name, known)}; the file holds: {', '.join(known)}"
            found.append(Finding("section-unknown", -1, message))
    kept = [name for name in wanted if name in known]
    if kept == wanted or not kept:
        return builder
    chosen = {"subsets_prompts": kept, "sections": []} if isinstance(info, SectionInfo) else {"sections": kept}
    cfg = replace(builder.cfg, build_info={**builder.cfg.build_info, **chosen})
    return type(builder)(cfg, builder.image, builder.default_prompts)


def _section_names(paths: Sequence[Path]) -> list[str] | None:
    """Sections that every file holds; None when one is no JSON object, which reading it will tell better."""
    names: dict[str, int] = {}
    for path in paths:
        if path.suffix.lower() != ".json":
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict):
            return None
        for name in content:
            names[name.strip()] = names.get(name.strip(), 0) + 1
    return [name for name, count in names.items() if count == len(paths)]


def find_encoder(cfg: Config) -> tuple[Encoder | None, str]:
    """What turns text into ids in this run, or None and why lengths cannot be checked. No weight is read or fetched."""
    if not _is_here(cfg.model):
        name = cfg.model.llama_model or "model.llama_model"
        return None, f"the language model '{name}' is not on this machine: lengths are not checked"
    try:
        model = build_model(cfg, torch.device("meta"), torch.float32)
    except MiniGPT4Error as error:
        return None, f"lengths are not checked: {str(error).splitlines()[0]}"
    return model.encoder, ""


def _is_here(cfg: ModelConfig) -> bool:
    if not cfg.llama_model or Path(cfg.llama_model).is_dir():
        return bool(cfg.llama_model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(cfg.llama_model, "config.json"), str)
    except HFValidationError:  # a path that is not there
        return False
