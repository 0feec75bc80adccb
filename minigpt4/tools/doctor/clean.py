"""Annotation files without the records that have an error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from minigpt4.common.files import write_atomically
from minigpt4.common.schema import DatasetConfig
from minigpt4.datasets.annotations import Annotations
from minigpt4.datasets.map_dataset import AnnotationDataset
from minigpt4.tools.doctor.examine import Split
from minigpt4.tools.doctor.result import Result


def write_clean(folder: Path, splits: Sequence[Split], results: Mapping[str, Result]) -> list[str]:
    """``<data set>/clean.jsonl`` per annotation file, as the records were written; returns a line about each.

    Records that a fraction holds out stay in the file: they are held out again. A ``val.ann_path`` gets
    ``clean_val.jsonl``.
    """
    lines: list[str] = []
    files: dict[Path, tuple[Annotations, set[int]]] = {}
    for split in splits:
        dataset = split.dataset
        if not isinstance(dataset, AnnotationDataset):
            lines.append(f"{split.title}: tar shards are not rewritten")
            continue
        is_own = split.split != "train" and not dataset.cfg.val.fraction
        path = folder / dataset.name / ("clean_val.jsonl" if is_own else "clean.jsonl")
        wrong = files.setdefault(path, (dataset.annotations, set()))[1]
        wrong |= {dataset.annotation_index(index) for index in results[split.title].wrong}
        if path.name == "clean.jsonl" and split.split == "train":
            lines.append(_usage(dataset, path))
    for path, (written, wrong) in files.items():
        kept = [record for index, record in enumerate(written) if index not in wrong]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        lines.append(f"{path}: {len(kept):,} of {len(written):,} records")
    return lines


def _usage(dataset: AnnotationDataset, path: Path) -> str:
    """How a configuration takes the file."""
    key = f"datasets.{dataset.name}"
    given = dataset.cfg.build_info.get("ann_path")
    if isinstance(given, list) or (isinstance(given, str) and Path(given).is_file()):
        is_mapping = dataset.annotations.layout == "mapping" and dataset.cfg.format == "auto"
        return f"use it: --options {key}.build_info.ann_path={path}" + (f" {key}.format=mapping" if is_mapping else "")
    block = path.with_name("block.yaml")
    block.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(block, yaml.safe_dump({"datasets": {f"{dataset.name}_clean": _block(dataset, path)}}))
    return f"use it: {block} is a block for your YAML file, in place of {dataset.name}"


def _block(dataset: AnnotationDataset, path: Path) -> dict[str, Any]:
    """The data set by the plain builder: its own reads other files than one of records."""
    settings = asdict(replace(dataset.cfg, builder="annotations"))
    default = asdict(DatasetConfig())
    changed = {key: value for key, value in settings.items() if value != default.get(key) and key != "name"}
    info: dict[str, Any] = {"ann_path": str(path), "image_path": str(dataset.finder.root or "")}
    if dataset.finder.names:
        info["image_names"] = list(dataset.finder.names)
    return {"format": dataset.cfg.format, **changed, "build_info": info}
