"""Curves as inline SVG: axes, units, and the values under the pointer without any script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from minigpt4.report.numbers import short

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 18, 34
_POINTS = 240
"""Points of one line; of more than these the smallest and largest of every stretch."""
_STOPS = 80
"""Places along the axis that show values."""
_LOG_FROM = 30
"""Largest over smallest value from which an axis may be logarithmic."""

STYLE = """
:root { --c0: #2563b8; --c1: #c2570c; --c2: #1d7f4d; --c3: #8a3fb0; --c4: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --c0: #78aef5; --c1: #f0985a; --c2: #6cc893; --c3: #c79be6;
  --c4: #9aa2ad; } }
@media print { :root { --c0: #2563b8; --c1: #c2570c; --c2: #1d7f4d; --c3: #8a3fb0; --c4: #6b7280; } }
figure { margin: 0; } figcaption { display: flex; flex-wrap: wrap; gap: 0 .8rem; font-size: .85rem; }
figcaption b { font-weight: 600; } figcaption i { font-style: normal; color: var(--dim); white-space: nowrap; }
figcaption i::before { content: ""; display: inline-block; width: .8rem; height: .2rem; margin-right: .3rem;
  vertical-align: .2rem; background: var(--k); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--dim); font: 10px system-ui, sans-serif; }
svg.bar { height: 1rem; margin: .3rem 0; }
svg .axis { stroke: var(--line); stroke-width: 1; } svg .mark { stroke: var(--dim); stroke-dasharray: 2 3; }
svg path { fill: none; stroke-width: 1.6; stroke-linejoin: round; } svg path.faint { opacity: .35; stroke-width: 1; }
svg path.dots { stroke-dasharray: 4 3; }
svg .stop rect { fill: transparent; } svg .stop g { visibility: hidden; pointer-events: none; }
svg .stop:hover g { visibility: visible; } svg .stop text { fill: var(--text); } svg .stop line { stroke: var(--dim); }
""" + "".join(f".k{n} {{ stroke: var(--c{n}); --k: var(--c{n}); }} .f{n} {{ fill: var(--c{n}); }}" for n in range(5))


@dataclass(frozen=True)
class Line:
    """A curve. ``look``: '' a line, 'faint' a thin one behind others, 'dots' dashes with a dot per point."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    look: str = ""


@dataclass(frozen=True)
class _Scale:
    """Values to places on an axis."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = (
            (math.log(x) for x in (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (here - low) / (high - low)


def chart(title: str, unit: str, lines: Sequence[Line], may_be_log: bool = False, marks: Sequence[float] = ()) -> str:
    """A figure over windows with values in ``unit``; '' without points. ``marks``: windows with a dashed line."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    is_log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > _LOG_FROM
    across = _Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, _LEFT, WIDTH - _RIGHT)
    up = _value_scale(ys, is_log)
    parts = [_axes(across, up, xs)]
    parts += [
        f'<line class="mark" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
        for x in marks
        if across.low <= x <= across.high
    ]
    parts += [_drawn(line, across, up) for line in lines]
    parts += _stops(lines, across)
    shown = f"{unit}, logarithmic" if is_log else unit
    keys = "".join(f'<i class="k{line.colour}">{escape(line.label)}</i>' for line in lines) if len(lines) > 1 else ""
    said = "; ".join(f"{line.label}: {short(line.points[0][1])} to {short(line.points[-1][1])}" for line in lines)
    return (
        f'<figure class="card"><figcaption><b>{escape(title)}</b> <span class="dim">{escape(shown)}</span>{keys}'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}, {said}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def shares(label: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar of parts that make a whole: name, share, and a text beside the name."""
    places, begun = [], 0.0
    for colour, (_, share, _) in enumerate(parts):
        width = WIDTH * share
        places.append(
            f'<rect class="f{colour % 5}" x="{begun:.1f}" y="0" width="{max(width - 1, 0):.1f}" height="16"/>'
        )
        begun += width
    keys = "".join(
        f'<i class="k{colour % 5}">{escape(name)} {100 * share:.1f} % ({escape(text)})</i>'
        for colour, (name, share, text) in enumerate(parts)
    )
    return (
        f'<figure class="card"><figcaption><b>{escape(label)}</b></figcaption>'
        f'<svg class="bar" viewBox="0 0 {WIDTH} 16" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(label)}">{"".join(places)}</svg>'
        f"<figcaption>{keys}</figcaption></figure>"
    )


def thinned(points: Sequence[tuple[float, float]], limit: int = _POINTS) -> list[tuple[float, float]]:
    """At most ``limit`` points; peaks stay."""
    if len(points) <= limit:
        return list(points)
    kept = []
    half = limit // 2
    for number in range(half):
        stretch = points[number * len(points) // half : (number + 1) * len(points) // half]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _value_scale(ys: Sequence[float], is_log: bool) -> _Scale:
    low, high = min(ys), max(ys)
    if is_log:
        return _Scale(low / 1.1, high * 1.1, HEIGHT - _BOTTOM, _TOP, True)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return _Scale(low if low == 0.0 else low - room, high + room, HEIGHT - _BOTTOM, _TOP)


def _axes(across: _Scale, up: _Scale, xs: Sequence[float]) -> str:
    floor = HEIGHT - _BOTTOM
    parts = []
    for value in _log_ticks(up) if up.is_log else _ticks(up.low, up.high, 4):
        y = up(value)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(across.low, across.high, 5):
        if max(xs) > min(xs) or value == min(xs):
            parts.append(f'<text x="{across(value):.1f}" y="{floor + 13}" text-anchor="middle">{short(value)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">window (optimiser steps)</text>')
    return "".join(parts)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two values."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(scale: _Scale) -> list[float]:
    decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    steps = (1, 3) if len(decades) < 5 else (1,)
    return [m * 10.0**n for n in decades for m in steps if scale.low <= m * 10.0**n <= scale.high]


def _drawn(line: Line, across: _Scale, up: _Scale) -> str:
    places = [(across(x), up(y)) for x, y in thinned(line.points)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    drawn = f'<path class="k{line.colour} {line.look}" d="{path}"/>'
    if line.look == "dots" or len(places) == 1:
        drawn += "".join(f'<circle class="f{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places)
    return drawn


def _stops(lines: Sequence[Line], across: _Scale) -> list[str]:
    """Invisible stripes side by side; the one under the pointer (or finger) shows its window's values on top."""
    values: dict[float, list[str]] = {}
    for line in lines:
        for x, y in line.points:
            values.setdefault(x, []).append(f"{line.label} {short(y)}" if len(lines) > 1 else short(y))
    every = math.ceil(len(values) / _STOPS)
    places = sorted(values)[::-1][::every][::-1]  # the last one stays
    edges = [across.start, *((across(a) + across(b)) / 2 for a, b in pairwise(places)), across.end]
    result = []
    for place, left, right in zip(places, edges[:-1], edges[1:], strict=True):
        text, x = escape(f"{short(place)}: {', '.join(values[place])}"), across(place)
        result.append(
            f'<g class="stop"><rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{HEIGHT - _BOTTOM - _TOP}"/><g><line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" '
            f'y2="{HEIGHT - _BOTTOM}"/><text x="{WIDTH - _RIGHT}" y="11" text-anchor="end">{text}</text></g></g>'
        )
    return result
