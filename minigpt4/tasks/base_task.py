"""One epoch, one window: where the gradient of a batch comes from."""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minigpt4.common.dist import DistContext, sync_gradients
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.optim import set_learning_rate
from minigpt4.common.sharding import whole
from minigpt4.common.types import Batch
from minigpt4.tasks.memory import describe_row
from minigpt4.tasks.phases import PhaseClock

if TYPE_CHECKING:
    from minigpt4.models.base_model import LossOutput


class NonFiniteError(MiniGPT4Error):
    """The loss or its gradient is not a number any more; the batch is saved for inspection."""


@dataclass(frozen=True)
class Training:
    """What a step needs; built once by the runner.

    model: as it is called in training (DDP or plain); core: the model itself, which owns its arithmetic's precision.
    is_sharded: its weights are split over ranks, which must call the same modules in step.
    scaler: on for fp16. lr_at: iteration -> learning rate. stop_requested: asked once per window on every rank.
    clock: told where each phase of a step ends; the model's language decoder marks the end of vision.
    """

    model: nn.Module
    core: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lr_at: Callable[[int], float]
    dist: DistContext
    accumulation: int
    clip_grad_norm: float
    seed: int
    job_dir: Path
    stop_requested: Callable[[], bool]
    is_sharded: bool = False
    clock: PhaseClock = field(default_factory=PhaseClock)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@dataclass(frozen=True)
class StepStats:
    """One window, over all ranks. ``loss`` and ``grad_norm`` are NaN when the window was skipped."""

    loss: float
    grad_norm: float
    lr: float
    samples: int
    target_tokens: int
    waited_s: float
    is_skipped: bool
    should_stop: bool


class BaseTask(ABC):
    """A kind of training. A subclass says what the loss of a batch is."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Summed loss of one row set; ``model`` may be wrapped."""

    def train_epoch(
        self,
        training: Training,
        windows: Iterator[list[Batch]],
        numbers: Sequence[int],
        after_window: Callable[[int, StepStats], bool],
    ) -> bool:
        """Train the windows ``numbers``; ``after_window`` says whether to go on. Returns whether all were trained."""
        training.model.train()
        for number in numbers:
            begun = time.perf_counter()
            window = next(windows)
            stats = self.train_step(training, window, number, time.perf_counter() - begun)
            del window  # the next window is collated while this name would keep the old one alive
            if not after_window(number, stats):
                return False
        return True

    def train_step(self, training: Training, window: Sequence[Batch], number: int, waited: float = 0.0) -> StepStats:
        """One optimiser step whose gradient is that of one big batch: all rows of the window on all ranks.

        Every row's summed token loss is divided by the global count of target tokens, so neither how samples are
        spread over rows, micro-batches and ranks nor padding weighs into the mean. Rows may differ in number per rank.
        Raises NonFiniteError before the weights are touched.
        """
        dist = training.dist
        learning_rate = training.lr_at((number + 1) * training.accumulation - 1)
        set_learning_rate(training.optimizer, learning_rate)
        counts = dist.sum([sum(b.num_target_tokens for b in window), sum(len(b.lengths) for b in window)])
        scale = dist.world_size / counts[0].clamp(min=1)  # DDP averages over ranks; the sum is wanted
        losses = []
        rows = _in_step(window, dist) if training.is_sharded else window
        for row, batch in enumerate(rows):
            # the last row alone sends gradients; frozen seeds make dropout a function of the place in the run
            with sync_gradients(training.model, row == len(rows) - 1, training.is_sharded):
                torch.manual_seed(row_seed(training.seed, number, dist.rank, row))
                training.clock.start()
                try:
                    losses.append(self._backward(training, batch.to(dist.device), scale))
                except torch.OutOfMemoryError as error:
                    error.add_note(f"window {number + 1}, {describe_row(batch, row, len(rows))}")
                    raise
        row_losses = torch.stack(losses)[: len(window)]
        norm = self._unscaled_norm(training)
        total, tokens, samples, grad_norm, stop = self._on_host(training, row_losses, counts, norm)
        stats = StepStats(
            total / tokens if tokens else math.nan, grad_norm if tokens else math.nan, learning_rate,
            int(samples), int(tokens), waited, tokens == 0, stop > 0,
        )  # fmt: skip
        self._check_finite(training, stats, window, row_losses, number)
        if not stats.is_skipped:
            training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.zero_grad(set_to_none=True)
        training.clock.mark("optimizer")
        training.clock.stop()
        return stats

    def rehearse(self, training: Training, batch: Batch) -> None:
        """One forward and backward before the first window, whose gradient is thrown away.

        DDP orders its gradient buckets anew after its first backward, by when each gradient came. The sum of three and
        more ranks' numbers depends in its last bit on their place in a bucket: without this, the first windows after a
        resume would be summed in another order than those of a run that was not interrupted.
        """
        training.model.train()
        torch.autograd.backward(self.loss(training.model, batch.to(training.dist.device)).loss_sum)
        training.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def validate(self, training: Training, batches: Iterable[Batch]) -> float:
        """Mean token loss of this rank's ``batches`` together with those of the other ranks, in eval mode."""
        training.core.eval()
        total = torch.zeros((), dtype=torch.float64, device=training.dist.device)
        tokens = 0
        for batch in batches:
            total += self.loss(training.core, batch.to(training.dist.device)).loss_sum
            tokens += batch.num_target_tokens
        training.core.train()
        count = int(training.dist.sum(tokens))
        return float(training.dist.sum(total)) / count if count else math.nan

    def _backward(self, training: Training, batch: Batch, scale: Tensor) -> Tensor:
        """Add one row's gradient; returns its loss sum, detached.

        Memory: backward frees the graph node by node, and what is left (batch on the device, output) dies with this
        frame before the next row starts. The model returns sums, never logits. So there is nothing for `del outputs`
        or `torch.cuda.empty_cache()` to free; the latter would only make the next row ask the driver again.
        """
        output = self.loss(training.model, batch)
        training.clock.mark("language")
        torch.autograd.backward(training.scaler.scale(output.loss_sum * scale))
        training.clock.mark("backward")
        return output.loss_sum.detach().double()

    def _unscaled_norm(self, training: Training) -> Tensor:
        """Total gradient norm before clipping, a device tensor; gradients are clipped unless clipping is off."""
        training.scaler.unscale_(training.optimizer)
        limit = training.clip_grad_norm if training.clip_grad_norm > 0 else math.inf
        norm: Tensor = nn.utils.clip_grad_norm_(training.parameters, limit)
        return whole(norm) if training.is_sharded else norm

    def _on_host(
        self, training: Training, row_losses: Tensor, counts: Tensor, norm: Tensor
    ) -> tuple[float, float, float, float, float]:
        """loss sum, target tokens, samples, gradient norm, stop votes: the one wait for the device per window."""
        stop = torch.full((), float(training.stop_requested()), dtype=torch.float64, device=row_losses.device)
        votes = training.dist.sum(torch.stack([row_losses.sum(), stop]))
        values = torch.cat([votes[:1], counts.double(), norm.double()[None], votes[1:]]).tolist()
        return values[0], values[1], values[2], values[3], values[4]

    def _check_finite(
        self, training: Training, stats: StepStats, window: Sequence[Batch], row_losses: Tensor, number: int
    ) -> None:
        # with fp16 an infinite gradient is the scaler's business (it skips the step and halves its scale) until
        # the scale is so small that overflow cannot be the reason
        is_overflow = training.scaler.is_enabled() and training.scaler.get_scale() > 1.0
        is_bad = not math.isfinite(stats.loss) or (not math.isfinite(stats.grad_norm) and not is_overflow)
        if stats.is_skipped or not is_bad:
            return
        bad_rows = [row for row, value in enumerate(row_losses.tolist()) if not math.isfinite(value)]
        named = bad_rows or range(len(window))
        ids = [sample_id for row in named for sample_id in window[row].sample_ids]
        path = _save_window(
            training, window, number, {"loss": stats.loss, "grad_norm": stats.grad_norm, "samples": ids}
        )
        shown = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        raise NonFiniteError(
            f"window {number + 1}: loss {stats.loss}, gradient norm {stats.grad_norm}; the weights were not changed\n"
            f"samples on rank {training.dist.rank}: {shown}\n"
            f"the batch is saved in {path}; look at these samples, lower run.init_lr, or use precision bf16 or fp32"
        )


def _in_step(window: Sequence[Batch], dist: DistContext) -> Sequence[Batch]:
    """``window`` with as many rows as that of the rank with most: every row gathers weights from all ranks. What is
    added is the shortest row without its targets."""
    missing = dist.largest(len(window)) - len(window)
    shortest = min(window, key=lambda batch: batch.input_ids.numel())
    return [*window, *[shortest.without_targets()] * missing]


def row_seed(seed: int, window: int, rank: int, row: int) -> int:
    """A 63-bit seed for dropout in one forward: resuming at any window draws what the undisturbed run drew."""
    digest = hashlib.blake2b(f"{seed}/{window}/{rank}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _save_window(training: Training, window: Sequence[Batch], number: int, report: dict[str, object]) -> Path:
    """Tensors and ids of a window for inspection: ``<job>/nonfinite/window_<n>_rank<r>.{pt,json}``."""
    folder = training.job_dir / "nonfinite"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"window_{number + 1}_rank{training.dist.rank}.pt"
    tensors = ("input_ids", "position_ids", "labels", "images")
    read = [batch.to(torch.device("cpu")) for batch in window]  # as the model read it
    rows = [{name: getattr(batch, name) for name in tensors} for batch in read]
    torch.save([{**row, "sample_ids": list(b.sample_ids)} for row, b in zip(rows, window, strict=True)], path)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return path
