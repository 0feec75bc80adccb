"""How the cost of records grows with their number: seconds to start, resident bytes, CPU-time of a window.

    python benchmarks/data_growth.py                       1e2 to 1e6 records, about 8 CPU-minutes
    python benchmarks/data_growth.py --quick --json out.json   JSON up to 1e5

Records of data_loading.py in indexed shards, a JSON list and JSON lines, each opened by a process of its own; JSON of
32 MB and more is opened twice, and the second start, which finds the index, counts. A window is 32 records: drawing
them and reading their text, without pictures, CPU-microseconds per record over 64 windows at random places. The last
column says what a record costs at the largest size over what it costs at the smallest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.data_loading import link_shards, make_dataset, open_records, write_annotations  # noqa: E402
from benchmarks.shared import in_process, parser, say, write_json  # noqa: E402

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
KINDS = ("shards", "json", "jsonl")
BATCH, WINDOWS = 32, 64


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser(__doc__, "JSON up to 1e5 records")
    options.add_argument("--worker", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.worker:
        print(json.dumps(work(given.worker[0], Path(given.worker[1]))))
        return 0
    cells = []
    for kind in KINDS:
        for size in SIZES:
            if not (given.quick and kind != "shards" and size > 100_000):
                say(f"{size:,} records in {kind}")
                cells.append({"kind": kind, "records": size, **measure(kind, size)})
    write_json(given.json, {"cells": cells})
    report(cells)
    return 0


def measure(kind: str, size: int) -> dict[str, Any]:
    """Figures of a process that opens ``size`` records."""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "shards":
            path, _ = link_shards(Path(folder), size)
        else:
            path = write_annotations(Path(folder) / f"records.{kind}", size)
        figures = in_process(__file__, "--worker", kind, str(path))
        if path.with_name(f".{path.name}.index").exists():
            figures = in_process(__file__, "--worker", kind, str(path))
    return figures


def work(kind: str, path: Path) -> dict[str, Any]:
    """Start, memory, and CPU-microseconds per record of windows at random places of the first pass."""
    from minigpt4.datasets.sampler import WindowSampler

    figures = open_records("shards" if kind == "shards" else "annotations", path)
    block: dict[str, Any] = {"format": "conversation", "build_info": {"ann_path": str(path), "image_path": "."}}
    if kind == "shards":
        block = {"builder": "shards", "build_info": {"storage": str(path)}}
    dataset = make_dataset(block, 224)
    sampler = WindowSampler([len(dataset)], [1.0], [BATCH], 1, 1, 0, seed=0)
    places = [Random(number).randrange(max(1, len(dataset) // BATCH)) for number in range(WINDOWS)]
    sampler.window(0)
    begun = time.process_time()
    drawn = [key for place in places for micro_batch in sampler.window(place) for key in micro_batch]
    drawing = time.process_time() - begun
    begun = time.process_time()
    for key in drawn:
        dataset.record(key.index)
    reading = time.process_time() - begun
    micro = 1e6 / len(drawn)
    kept = {key: figures[key] for key in ("start_s", "bytes_per_record", "bytes_after_reading")}
    return {**kept, "draw_us": drawing * micro, "read_us": reading * micro}


def growth(cells: Iterable[dict[str, Any]]) -> float:
    """Time per record of a window at the largest size over that at the smallest."""
    ordered = sorted(cells, key=lambda cell: cell["records"])
    first, last = (cell["draw_us"] + cell["read_us"] for cell in (ordered[0], ordered[-1]))
    return float(last / first)


def report(cells: Sequence[dict[str, Any]]) -> None:
    """The figures as lines."""
    print("records in            number   start s   kB resident   bytes each   draw us   read us")
    for cell in cells:
        resident = cell["bytes_after_reading"] * cell["records"] / 1e3
        print(
            f"{cell['kind']:<18} {cell['records']:>9,} {cell['start_s']:>9.2f} {resident:>13,.0f} "
            f"{cell['bytes_after_reading']:>12.0f} {cell['draw_us']:>9.1f} {cell['read_us']:>9.1f}"
        )
    for kind in KINDS:
        found = [cell for cell in cells if cell["kind"] == kind]
        print(f"{kind}: a record of a window costs {growth(found):.2f} of what it costs among {found[0]['records']}")


if __name__ == "__main__":
    sys.exit(main())
