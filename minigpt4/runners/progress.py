"""What changes while a run trains, and goes into ``resume/state.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minigpt4.common.types import BadRecord

_EXAMPLES = 5
"""Messages kept per data set; of the others the index alone is."""


@dataclass
class Progress:
    """Counters of a run.

    window: optimiser steps done. skipped: windows without target tokens. loss: of the last window.
    best, best_by, best_window: the best validation value, of which metric, and when. stale: validations since then.
    is_over: an early stop has ended the run. bad_records: data set -> index -> message ('' after the first few).
    owes_validation: a signal stopped the run where a validation was due; whoever goes on from here begins with it.
    """

    window: int = 0
    skipped: int = 0
    loss: float = math.nan
    best: float | None = None
    best_by: str = ""
    best_window: int = 0
    stale: int = 0
    is_over: bool = False
    owes_validation: bool = False
    bad_records: dict[str, dict[int, str]] = field(default_factory=dict)

    def judge(self, name: str, value: float, is_lower_better: bool) -> bool:
        """Whether ``value`` of metric ``name`` is the best so far; a value that is no number never is."""
        if self.best_by != name:  # another metric decides since a resume: the old best says nothing
            self.best, self.best_by, self.stale = None, name, 0
        is_best = math.isfinite(value) and (
            self.best is None or (value < self.best if is_lower_better else value > self.best)
        )
        if is_best:
            self.best, self.best_window, self.stale = value, self.window, 0
        else:
            self.stale += 1
        return is_best

    def add_bad(self, records: Iterable[BadRecord]) -> None:
        """Counts broken records, each once."""
        for record in records:
            known = self.bad_records.setdefault(record.dataset, {})
            known.setdefault(record.index, record.message if len(known) < _EXAMPLES else "")

    def merge_bad(self, others: Iterable[Mapping[str, Mapping[int, str]]]) -> None:
        """Adds what other ranks have counted."""
        for other in others:
            for name, records in other.items():
                self.add_bad(BadRecord(name, index, message) for index, message in sorted(records.items()))

    def bad_summary(self) -> dict[str, dict[str, Any]]:
        """Data set -> number of records passed over and examples, for the manifest."""
        return {
            name: {"count": len(records), "examples": [text for text in records.values() if text][:_EXAMPLES]}
            for name, records in self.bad_records.items()
        }

    def to_state(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "loss": self.loss if math.isfinite(self.loss) else None}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """The counters of a checkpoint."""
        values = {item.name: state[item.name] for item in fields(cls) if item.name in state}
        values["loss"] = math.nan if state["loss"] is None else float(state["loss"])
        bad = values.get("bad_records", {})
        values["bad_records"] = {name: {int(i): text for i, text in rows.items()} for name, rows in bad.items()}
        return cls(**values)
