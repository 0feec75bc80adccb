"""Where the time and the memory of optimiser steps go: vision, language, backward, optimiser."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

PHASES = ("vision", "language", "backward", "optimizer")


class PhaseClock:
    """Seconds and peak bytes per phase, without making the host wait for a GPU.

    On a GPU a mark is an event in its queue; events are read in ``take``, when the step has been waited for anyway.
    On a CPU it is the time of day, and no peaks are known. ``device`` None: the clock never runs.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._is_off = device is None
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._marks: list[tuple[str, Any]] = []
        self._peaks = dict.fromkeys(PHASES, 0)
        self._is_running = False
        self._kept = 0
        self._highest = 0

    def start(self) -> None:
        """The clock runs from here; what came before belongs to no phase."""
        if self._is_off:
            return
        self._is_running = True
        self._keep_highest()
        self._mark("")

    def mark(self, phase: str) -> None:
        """What has run since the last call was ``phase``. Ignored while the clock stands."""
        if not self._is_running:
            return
        peak = self._keep_highest()
        self._peaks[phase] = max(self._peaks[phase], peak)
        self._mark(phase)

    def stop(self) -> None:
        """The clock stands: generation and validation are no phases of a step."""
        self._is_running = False
        self._kept = len(self._marks)

    def drop(self) -> None:
        """What has run since the last stop was no step, and the clock stands."""
        del self._marks[self._kept :]
        self._is_running = False

    def take(self, windows: int) -> dict[str, float]:
        """Mean seconds per window and peak GB of each phase since the last call; 0 GB on a CPU.

        A step that has begun and not ended counts for the next call.
        """
        seconds = dict.fromkeys(PHASES, 0.0)
        ended, self._marks = self._marks[: self._kept], self._marks[self._kept :]
        if ended and self._gpu is not None:
            ended[-1][1].synchronize()
        for (_, before), (phase, after) in pairwise(ended):
            if phase:
                seconds[phase] += self._between(before, after)
        values = {f"{phase}_s": value / max(windows, 1) for phase, value in seconds.items()}
        values.update({f"{phase}_gb": peak / 2**30 for phase, peak in self._peaks.items()})
        self._kept = 0
        self._peaks = dict.fromkeys(PHASES, 0)
        return values

    def highest(self) -> int:
        """Peak bytes of live tensors on the GPU since the process began; 0 on a CPU."""
        self._keep_highest()
        return self._highest

    def _keep_highest(self) -> int:
        """The peak since the last call. The allocator's own counter starts anew."""
        if self._gpu is None:
            return 0
        peak = int(torch.cuda.max_memory_allocated(self._gpu))
        torch.cuda.reset_peak_memory_stats(self._gpu)
        self._highest = max(self._highest, peak)
        return peak

    def _mark(self, phase: str) -> None:
        if self._gpu is None:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((phase, event))

    def _between(self, before: Any, after: Any) -> float:
        seconds: float = after - before if self._gpu is None else before.elapsed_time(after) / 1e3
        return seconds
