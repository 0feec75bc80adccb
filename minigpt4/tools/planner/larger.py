"""Fewer and fuller rows for the same optimiser step, where a card has room for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from minigpt4.tools.planner.estimate import Estimate, Planner, usable_bytes
from minigpt4.tools.planner.proposal import Proposal, Work, rows_change
from minigpt4.tools.planner.workload import Row, fullest_row


def enlarge(planner: Planner, work: Work, start: Estimate, card_gb: float) -> Proposal | None:
    """The largest rows that fit with room to spare: half as many per optimiser step as now, or fewer.

    The samples of a step stay the same to the last one. None where the rows are as large as they can be.
    """
    usable = usable_bytes(card_gb)
    for larger, row in _larger(work, start.row):
        if row.samples > planner.most_samples(start.variant, row, usable):  # by the line: spares most traces
            continue
        estimate = planner.estimate(start.variant, row)
        if estimate.fits(usable):
            text, options = rows_change(planner, work, larger, start.row, row)
            return Proposal((text,), tuple(options), estimate)
    return None


def _larger(work: Work, row: Row) -> Iterator[tuple[Work, Row]]:
    """The same samples in fewer rows, the fewest first."""
    accumulation = work.window.accumulation
    if row.packed:
        available = max(item.batch_size for item in work.sets) * accumulation
        for rows in range(1, math.ceil(available / row.samples) // 2 + 1):
            samples = math.ceil(available / rows)
            yield work, fullest_row(work.sets, work.window, True, samples * row.shape.positions)
        return
    for rows in (count for count in range(1, accumulation // 2 + 1) if accumulation % count == 0):
        factor = accumulation // rows
        sets = [replace(item, batch_size=item.batch_size * factor) for item in work.sets]
        mean = work.window.samples_per_micro_batch * factor
        window = replace(work.window, samples_per_micro_batch=mean, accumulation=rows)
        yield Work(sets, window), fullest_row(sets, window, False, 0)
