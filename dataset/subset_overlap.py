"""How two annotation files share pictures: entries, distinct paths, and the intersection in both directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minigpt4.common.errors import DataError
from minigpt4.datasets.annotations import check_file
from minigpt4.datasets.json_lists import stream_list_texts


def read_records(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    """Records of a JSON list, each with its own text in the file. Raises DataError with file and number."""
    check_file(path)
    number = -1
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for number, (record, text) in enumerate(stream_list_texts(stream)):
                if not isinstance(record, dict):
                    raise DataError(f"{path}, record {number}: found {type(record).__name__}, expected an object")
                yield record, text
    except ValueError as error:  # not JSON, not a list, not UTF-8
        raise DataError(f"{path}, after record {number}: not a JSON list of records: {error}") from None


def key_of(record: Mapping[str, Any]) -> str:
    """The picture's relative path in one spelling: '/' between folders, no './' in front; '' for none."""
    key = str(record.get("image") or "").strip().replace("\\", "/")
    while key.startswith("./"):
        key = key[2:].lstrip("/")
    return key


def prefix_of(key: str) -> str:
    """The source that a path's folders name: 'coco/train2017', 'sam/images'; '.' for a bare file name."""
    return "/".join(key.split("/")[:-1][:2]) or "."


def count_keys(path: Path) -> Counter[str]:
    """Entries per picture, of records that have one. Raises DataError when none has."""
    keys = Counter(key for record, _ in read_records(path) if (key := key_of(record)))
    if not keys:
        raise DataError(f"{path}: no record has a field 'image'")
    return keys


def compare(first: Counter[str], second: Counter[str]) -> dict[str, Any]:
    """The figures of two files. Entries may repeat a path: only distinct paths form sets."""
    common = first.keys() & second.keys()
    report: dict[str, Any] = {
        "A": _own_figures(first),
        "B": _own_figures(second),
        "paths in both": len(common),
        "entries of A whose path is in B": sum(first[key] for key in common),
        "entries of B whose path is in A": sum(second[key] for key in common),
        "paths in A only": len(first.keys() - second.keys()),
        "paths in B only": len(second.keys() - first.keys()),
        "paths in either": len(first.keys() | second.keys()),
        "per prefix": _per_prefix(first, second),
    }
    check(report)
    return report


def check(report: Mapping[str, Any]) -> None:
    """What holds for any two sets. A failure would be a mistake of this program, not of the files."""
    unique_a, unique_b, both = report["A"]["distinct paths"], report["B"]["distinct paths"], report["paths in both"]
    assert both <= min(unique_a, unique_b)
    assert unique_a + unique_b - both == report["paths in either"]
    assert both <= report["entries of A whose path is in B"] <= report["A"]["entries"]
    assert both <= report["entries of B whose path is in A"] <= report["B"]["entries"]
    assert sum(row["paths in both"] for row in report["per prefix"].values()) == both


def _own_figures(keys: Counter[str]) -> dict[str, int]:
    entries = keys.total()
    repeated = [count for count in keys.values() if count > 1]
    return {
        "entries": entries,
        "distinct paths": len(keys),
        "surplus entries": entries - len(keys),
        "paths with several entries": len(repeated),
    }


def _per_prefix(first: Counter[str], second: Counter[str]) -> dict[str, dict[str, int]]:
    rows: dict[str, dict[str, int]] = {}
    names = ("entries of A", "distinct paths of A", "entries of B", "distinct paths of B", "paths in both")
    for key in sorted(first.keys() | second.keys()):
        row = rows.setdefault(prefix_of(key), dict.fromkeys(names, 0))
        values = (first[key], int(key in first), second[key], int(key in second), int(key in first and key in second))
        for name, value in zip(names, values, strict=True):
            row[name] += value
    return rows


def missing_images(keys: Iterable[str], find: Callable[[str], Path | None]) -> dict[str, Any]:
    """How many of the pictures are not on disk, with a few by name."""
    missing = [key for key in keys if find(key) is None]
    return {"count": len(missing), "examples": missing[:5]}


def show(report: Mapping[str, Any], first: Path, second: Path, console: Console) -> None:
    """Prints the report."""
    console.print(f"A = {first}\nB = {second}", highlight=False)
    table = Table("", "A", "B")
    for name in report["A"]:
        table.add_row(name, f"{report['A'][name]:,}", f"{report['B'][name]:,}")
    console.print(table)
    for name, value in report.items():
        if isinstance(value, int):
            console.print(f"{name}: {value:,}", highlight=False)
    for side, found in report.get("missing images", {}).items():
        console.print(f"pictures of {side} not on disk: {found['count']:,}", highlight=False)
    rows = report["per prefix"]
    table = Table("prefix", *next(iter(rows.values())))
    for prefix, row in sorted(rows.items(), key=lambda item: -sum(item[1].values()))[:20]:
        table.add_row(prefix, *(f"{value:,}" for value in row.values()))
    console.print(table)
    if len(rows) > 20:
        console.print(f"and {len(rows) - 20} more prefixes in the JSON file", highlight=False)
