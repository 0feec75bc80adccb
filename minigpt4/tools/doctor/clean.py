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
from minigpt4.datasets.annotations import Annotations, Record
from minigpt4.datasets.map_dataset import AnnotationDataset
from minigpt4.datasets.stored import StoredImage
from minigpt4.tools.doctor.examine import Split
from minigpt4.tools.doctor.result import Result


def write_clean(folder: Path, splits: Sequence[Split], results: Mapping[str, Result]) -> list[str]:
    """``<data set>/clean.jsonl`` per data set, as the records were written; returns a line about each.

    Records in sections go to ``clean.json``.
    Records that a fraction holds out stay in the file: they are held out again. A ``val.ann_path`` gets
    ``clean_val.jsonl``.
    """
    lines: list[str] = []
    usages: list[str] = []
    files: dict[Path, tuple[Annotations, set[int]]] = {}
    for split in splits:
        dataset = split.dataset
        if not isinstance(dataset, AnnotationDataset):
            lines.append(f"{split.title}: tar shards are not rewritten")
            continue
        if any(isinstance(value, StoredImage) for value in _flat(dataset.annotations[0])):
            lines.append(f"{split.title}: tables with pictures inside are not rewritten")
            continue
        is_own = split.split != "train" and not dataset.cfg.val.fraction
        kind = ".json" if dataset.annotations.section(0) else ".jsonl"  # sections are parts of a .json file
        path = folder / dataset.name / f"{'clean_val' if is_own else 'clean'}{kind}"
        wrong = files.setdefault(path, (dataset.annotations, set()))[1]
        wrong |= {dataset.annotation_index(index) for index in results[split.title].wrong}
        if split.split == "train":
            usages.append(_usage(dataset, path))
    for path, (written, wrong) in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _content(written, wrong))
        lines.append(f"{path}: {len(written) - len(wrong):,} of {len(written):,} records")
    return [*usages, *lines]


def _flat(record: Record) -> list[Any]:
    return [item for value in record.values() for item in (value if isinstance(value, list) else [value])]


def _content(written: Annotations, wrong: set[int]) -> str:
    """Records in lines, or in their sections; a section that lost all of its records stays, empty."""
    if not written.section(0):
        kept = (record for index, record in enumerate(written) if index not in wrong)
        return "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in kept)
    sections: dict[str, list[Record]] = {}
    for index, record in enumerate(written):
        section = sections.setdefault(written.section(index), [])
        if index not in wrong:
            section.append(record)
    return json.dumps(sections, ensure_ascii=False, indent=1) + "\n"


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
