"""Charts of the benchmarks' figures: SVG files that read in light and dark mode.

    python benchmarks/charts.py [FOLDER] [--out FOLDER]     default: output/bench to benchmarks/charts

Reads the files that ``--json`` wrote there (wastes.json, packing.json, memory_growth.json, data_growth.json) and draws
those it finds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIDTH, LINE = 760, 18
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600;font-size:15px}.soft{fill:#59636e}
.bg{fill:#fff}.axis{stroke:#d1d9e0}.c0{--c:#0969da}.c1{--c:#bc4c00}.c2{--c:#1a7f37}
.bar{fill:var(--c)}.line{stroke:var(--c);fill:none;stroke-width:2}.dash{stroke-dasharray:5 4}.name{fill:var(--c)}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.soft{fill:#9198a1}.bg{fill:#0d1117}.axis{stroke:#3d444d}
.c0{--c:#58a6ff}.c1{--c:#f0883e}.c2{--c:#3fb950}}
"""


@dataclass(frozen=True)
class Series:
    """A line: points (x, y), a colour of 0 to 2, dashed or not."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_dashed: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 1 when the folder has nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE.parent / "output/bench", help="of the JSON files")
    parser.add_argument("--out", type=Path, default=HERE / "charts", help="where the SVG files go")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, draw in CHARTS.items():
        path = given.folder / f"{name}.json"
        if path.is_file():
            content = draw(json.loads(path.read_text(encoding="utf-8")))
            draft = given.out / f".{name}.svg"
            draft.write_text(content, encoding="utf-8")
            os.replace(draft, given.out / f"{name}.svg")
            print(given.out / f"{name}.svg")
            drawn += 1
    if not drawn:
        print(f"{given.folder} has none of {', '.join(f'{name}.json' for name in CHARTS)}", file=sys.stderr)
    return int(not drawn)


def wastes(figures: dict[str, Any]) -> str:
    """Time and memory of every rung, of the reference's way."""
    groups = [(row["name"], [(row["time_ratio"], 0), (row["memory_ratio"], 1)]) for row in figures["rungs"]]
    return bars("One waste after the other taken away: share of the reference's way", ["CPU time", "memory"], groups)


def packing(figures: dict[str, Any]) -> str:
    """Share of real positions, largest micro-batch."""
    size = max(row["micro_batch"] for row in figures["positions"])
    groups = [
        (
            f"{row['mixture']}, {row['image_tokens']} a picture",
            [(row["packed"], 0), (row["padded"], 2), (row["reference"], 1)],
        )
        for row in figures["positions"]
        if row["micro_batch"] == size
    ]
    title = f"Share of computed positions that are real, micro-batches of {size}"
    return bars(title, ["packed", "padded", "the reference's padding"], groups, [0, 2, 1])


def memory_growth(figures: dict[str, Any]) -> str:
    """Live memory over the length of answers, a line per vocabulary and side."""
    sizes = sorted({cell["vocabulary"] for cell in figures["cells"]})
    series = [
        Series(
            f"{size // 1000}k words, {'ours' if side == 'ours' else 'reference'}",
            [(c["tokens"], c["bytes"][side] / 1e6) for c in figures["cells"] if c["vocabulary"] == size],
            number,
            side != "ours",
        )
        for number, size in enumerate(sizes)
        for side in ("ours", "reference")
    ]
    return lines("Live memory of a step above the model, MB", "supervised tokens of one sample", series)


def data_growth(figures: dict[str, Any]) -> str:
    """CPU time per record of a window over the number of records."""
    kinds = list(dict.fromkeys(cell["kind"] for cell in figures["cells"]))
    series = [
        Series(
            {"shards": "indexed shards", "json": "JSON list", "jsonl": "JSON lines"}.get(kind, kind),
            [(c["records"], c["draw_us"] + c["read_us"]) for c in figures["cells"] if c["kind"] == kind],
            number,
        )
        for number, kind in enumerate(kinds)
    ]
    return lines("Drawing and reading a record, CPU microseconds", "records of the data set", series)


CHARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "wastes": wastes,
    "packing": packing,
    "memory_growth": memory_growth,
    "data_growth": data_growth,
}


def bars(
    title: str,
    legend: Sequence[str],
    groups: Sequence[tuple[str, Sequence[tuple[float, int]]]],
    colours: Sequence[int] = (0, 1, 2),
) -> str:
    """Horizontal bars from 0, with their values: groups of (name, [(value, colour)])."""
    left, right, top = 270, WIDTH - 70, 66
    most = max(value for _, row in groups for value, _ in row)
    parts = [text(20, 28, title, "title"), *key(legend, colours, 50)]
    y = top
    for name, row in groups:
        parts.append(text(left - 10, y + len(row) * LINE / 2 + 3, name, anchor="end"))
        for value, colour in row:
            width = (right - left) * value / most
            parts.append(f'<rect class="bar c{colour}" x="{left}" y="{y}" width="{width:.1f}" height="{LINE - 4}"/>')
            parts.append(text(left + width + 6, y + LINE - 6, f"{value:.2f}", "soft"))
            y += LINE
        y += 10
    parts.append(f'<path class="axis" d="M{left} {top - 4}V{y - 6}"/>')
    return page(parts, y + 8)


def lines(title: str, below: str, series: Sequence[Series]) -> str:
    """Lines over two logarithmic axes, named at their right ends."""
    left, right, top, bottom = 70, WIDTH - 190, 50, 340
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    across, up = Scale(min(xs), max(xs), left, right), Scale(*around(min(ys), max(ys)), bottom, top)
    parts = [text(20, 28, title, "title"), text((left + right) / 2, bottom + 42, below, "soft", "middle")]
    for tick in up.ticks():
        parts.append(f'<path class="axis" d="M{left} {up(tick):.1f}H{right}"/>')
        parts.append(text(left - 8, up(tick) + 4, short(tick), "soft", "end"))
    for tick in dict.fromkeys(xs):
        parts.append(text(across(tick), bottom + 20, short(tick), "soft", "middle"))
    ends = spread_out([up(one.points[-1][1]) + 4 for one in series])
    for one, end in zip(series, ends, strict=True):
        place = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in one.points)
        dash = " dash" * one.is_dashed
        parts.append(f'<polyline class="line c{one.colour}{dash}" points="{place}"/>')
        dots = (
            f'<circle class="bar c{one.colour}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in one.points
        )
        parts += dots
        parts.append(text(right + 12, end, one.name, f"name c{one.colour}"))
    return page(parts, bottom + 60)


def around(least: float, most: float) -> tuple[float, float]:
    """1, 2 or 5 times powers of ten that enclose the values and lie a decade apart or more: no change looks larger."""
    steps = [factor * 10.0**power for power in range(-6, 13) for factor in (1, 2, 5)]
    low, high = max(step for step in steps if step <= least), min(step for step in steps if step >= most)
    if high < 10 * low:
        low = max(step for step in steps[::3] if step <= least)
    return low, max(high, 10 * low)


class Scale:
    """Values to pixels along a logarithmic axis."""

    def __init__(self, least: float, most: float, start: float, end: float) -> None:
        self.least, self.most, self.start, self.end = least, max(most, least * 1.01), start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.least) / math.log(self.most / self.least)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on the axis: powers of ten, and where these are few twice and five times them."""
        powers = range(math.floor(math.log10(self.least)), math.ceil(math.log10(self.most)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [f * 10.0**power for power in powers for f in factors]
            kept = [value for value in found if self.least <= value <= self.most]
            if len(kept) >= 4:
                return kept
        return kept


def spread_out(places: Sequence[float], least: float = 16) -> list[float]:
    """The same places, moved down where needed so that any two are ``least`` apart; in the order given."""
    result = list(places)
    last = -math.inf
    for number in sorted(range(len(places)), key=lambda number: places[number]):
        last = result[number] = max(places[number], last + least)
    return result


def short(value: float) -> str:
    """1000 -> 1k, 2000000 -> 2M, 1024 as it is."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def key(names: Sequence[str], colours: Sequence[int], y: float) -> list[str]:
    """A coloured square and a name each, in one line."""
    parts, x = [], 270.0
    for name, colour in zip(names, colours[: len(names)], strict=True):
        parts.append(f'<rect class="bar c{colour}" x="{x}" y="{y - 10}" width="11" height="11"/>')
        parts.append(text(x + 17, y, name, "soft"))
        x += 40 + 7.2 * len(name)
    return parts


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def page(parts: Sequence[str], height: float) -> str:
    """The SVG file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}">'
    ground = f'<rect class="bg" width="{WIDTH}" height="{height:.0f}" rx="8"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, *parts, "</svg>\n"])


if __name__ == "__main__":
    sys.exit(main())
