"""What a window came to: its figures on their way from the device to the host, and the verdict on them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.types import BadRecord, Batch

if TYPE_CHECKING:
    from minigpt4.tasks.base_task import Training


class NonFiniteError(MiniGPT4Error):
    """The loss or its gradient is not a number any more; the batch is saved for inspection."""


@dataclass(frozen=True)
class StepStats:
    """One window, over all ranks. ``loss`` and ``grad_norm`` are NaN when the window was skipped.

    passed_over: this rank's broken records, in whose place others were trained.
    """

    loss: float
    grad_norm: float
    lr: float
    samples: int
    target_tokens: int
    waited_s: float
    is_skipped: bool
    should_stop: bool
    passed_over: tuple[BadRecord, ...] = ()


@dataclass(frozen=True)
class WindowSums:
    """A window whose gradient is queued. ``waited``: seconds for its data.

    row_losses: summed loss per row of this rank, float64. counts: target tokens and samples over ranks, int64 [2].
    """

    rows: Sequence[Batch]
    number: int
    lr: float
    waited: float
    row_losses: Tensor
    counts: Tensor


class Figures:
    """The figures of one window. A GPU copies them while the host goes on; ``stats`` waits until they are there.

    values: loss sum, target tokens, samples, gradient norm, loss scale (1 without scaling), stop votes; float64 [6],
    the same on every rank.
    """

    def __init__(self, training: Training, window: WindowSums, values: Tensor) -> None:
        self._training, self._window, self._values = training, window, values
        self._on_host = values.to("cpu", non_blocking=True)  # of a GPU: pinned memory, filled by its queue
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    @property
    def number(self) -> int:
        """The window's place in the run."""
        return self._window.number

    @property
    def is_unusable(self) -> Tensor:
        """Whether weights must not follow this window, for the device to know alone; bool []."""
        total, tokens, _, norm, *_ = self._values.unbind()
        return (tokens == 0) | ~torch.isfinite(total) | ~torch.isfinite(norm)

    @cached_property
    def stats(self) -> StepStats:
        """The figures, waited for. Raises NonFiniteError, the same on every rank, when they are no numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        total, tokens, samples, norm, scale, votes = self._on_host.tolist()
        window = self._window
        stats = StepStats(
            total / tokens if tokens else math.nan, norm if tokens else math.nan, window.lr,
            int(samples), int(tokens), window.waited, tokens == 0, votes > 0,
            tuple(bad for batch in window.rows for bad in batch.passed_over),
        )  # fmt: skip
        # with fp16 an infinite gradient is the scaler's business (no step is taken and the scale is halved) until
        # the scale is so small that overflow cannot be the reason
        self._check(stats, is_overflow=scale > 1.0)
        return stats

    def _check(self, stats: StepStats, is_overflow: bool) -> None:
        is_bad = not math.isfinite(stats.loss) or (not math.isfinite(stats.grad_norm) and not is_overflow)
        if stats.is_skipped or not is_bad:
            return
        rows, number, rank = self._window.rows, self.number, self._training.dist.rank
        bad_rows = [row for row, value in enumerate(self._window.row_losses.tolist()) if not math.isfinite(value)]
        named = bad_rows or range(len(rows))
        ids = [sample_id for row in named for sample_id in rows[row].sample_ids]
        report = {"loss": stats.loss, "grad_norm": stats.grad_norm, "samples": ids}
        path = _save_rows(self._training.job_dir, rows, f"window_{number + 1}_rank{rank}", report)
        shown = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        raise NonFiniteError(
            f"window {number + 1}: loss {stats.loss}, gradient norm {stats.grad_norm}; the weights were not changed\n"
            f"samples on rank {rank}: {shown}\n"
            f"the batch is saved in {path}; look at these samples, lower run.init_lr, or use precision bf16 or fp32"
        )


def _save_rows(job_dir: Path, rows: Sequence[Batch], name: str, report: dict[str, object]) -> Path:
    """Tensors and ids of a window for inspection: ``<job>/nonfinite/window_<n>_rank<r>.{pt,json}``."""
    folder = job_dir / "nonfinite"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    tensors = ("input_ids", "position_ids", "labels", "images")
    read = [batch.to(torch.device("cpu")) for batch in rows]  # as the model read it
    content = [{name: getattr(batch, name) for name in tensors} for batch in read]
    torch.save([{**row, "sample_ids": list(b.sample_ids)} for row, b in zip(content, rows, strict=True)], path)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return path
