"""Numbers as a page writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minigpt4.metrics.intervals import Interval

NONE = "–"
"""What stands where no number is known."""


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a log line; None for anything else."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def short(value: float | None) -> str:
    """Three or four digits that mean something: 0.0123, 12.35, 3.00e-05, 16,375."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    if value == int(value) and size < 1e9:
        return f"{int(value):,}"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}" if size < 1 else f"{value:.4g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def interval(found: Interval) -> str:
    """A share and its interval in percent: 92.5 % (88.3 to 95.8)."""
    return f"{percent(found.value)} <span class=dim>({100 * found.low:.1f} to {100 * found.high:.1f})</span>"


def difference(found: Interval) -> str:
    """A difference of shares in percentage points, with a sign."""
    return f"{100 * found.value:+.1f} <span class=dim>({100 * found.low:+.1f} to {100 * found.high:+.1f})</span>"


def clock(seconds: float | None) -> str:
    """2 h 05 min, 3 min 20 s, 12 s."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
