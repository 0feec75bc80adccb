"""What a report may say of a record besides its question and answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common.errors import DataError
from minigpt4.datasets.annotations import Record
from minigpt4.datasets.formats import TEXT_FIELDS

if TYPE_CHECKING:
    from minigpt4.datasets.map_dataset import MapDataset

_LONGEST = 40
_MOST = 24
_NO_PROPERTY = {"id", "image_id", "question_id", "image", "images", "section", *TEXT_FIELDS}


def facts(dataset: MapDataset, index: int) -> dict[str, Any]:
    """``images``: paths of its picture files. ``section`` and ``meta`` where the record has them.

    A record that cannot be read has no facts; pictures inside tables and tars have no path.
    """
    try:
        record = dataset.record(index)
    except DataError:
        return {}
    section = record.get("section")
    known: dict[str, Any] = {"images": _paths(dataset, index)}
    if isinstance(section, str) and section:
        known["section"] = section
    properties = short_values(record)
    return {**known, **({"meta": properties} if properties else {})}


def short_values(record: Record) -> dict[str, str | int | float | bool]:
    """Fields of a record, and of its ``meta``, that hold a number or a few words: what groups may be made of."""
    nested = record.get("meta")
    fields = {**record, **(nested if isinstance(nested, dict) else {})}
    kept = {
        str(key): value
        for key, value in fields.items()
        if key not in _NO_PROPERTY
        and (isinstance(value, (bool, int, float)) or (isinstance(value, str) and 0 < len(value) <= _LONGEST))
    }
    return dict(list(kept.items())[:_MOST])


def _paths(dataset: MapDataset, index: int) -> list[str]:
    try:
        return [str(source) for source in dataset.sources(index) if isinstance(source, Path)]
    except DataError:
        return []
