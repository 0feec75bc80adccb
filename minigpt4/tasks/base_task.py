"""One epoch, one window: where the gradient of a batch comes from."""

from __future__ import annotations

import hashlib
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
from minigpt4.common.optim import set_learning_rate, step_unless
from minigpt4.common.sharding import whole
from minigpt4.common.types import Batch
from minigpt4.tasks.figures import Figures, StepStats, WindowSums
from minigpt4.tasks.memory import describe_row
from minigpt4.tasks.phases import PhaseClock

if TYPE_CHECKING:
    from minigpt4.models.losses import LossOutput


@dataclass(frozen=True)
class Training:
    """What a step needs; built once by the runner.

    model: as it is called in training (DDP or plain); core: the model itself, which owns its arithmetic's precision.
    is_sharded: its weights are split over ranks, which must call the same modules in step.
    scaler: on for fp16. lr_at: iteration -> learning rate. stop_requested: asked once per window on every rank.
    defer: the device alone decides whether weights follow a window, and the host reads its figures when the next one is
    queued; for a fused optimiser.
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
    defer: bool = False
    clock: PhaseClock = field(default_factory=PhaseClock)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


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
        is_due: Callable[[int], bool] = lambda number: True,
    ) -> bool:
        """Train the windows ``numbers``; ``after_window`` says whether to go on. Returns whether all were trained.

        With ``training.defer`` a GPU does not wait for the host: it is given the next window's gradient to compute
        before this window's figures are read, unless something ``is_due`` after this window. The next window changes
        weights only when it is known that this one was good and is not the last, so what a run leaves is the same.
        """
        training.model.train()
        late: Figures | None = None
        for number in numbers:
            begun = time.perf_counter()
            window = next(windows)
            sums = self._queue_gradient(training, window, number, time.perf_counter() - begun)
            del window  # the next window is collated while this name would keep the old one alive
            if late is not None and not after_window(late.number, late.stats):
                _drop_gradient(training)
                return False
            figures = self._follow_gradient(training, sums)
            late = figures if training.defer and number != numbers[-1] and not is_due(number) else None
            if late is None and not after_window(number, figures.stats):
                return False
            del sums, figures
        return True

    def train_step(self, training: Training, window: Sequence[Batch], number: int, waited: float = 0.0) -> StepStats:
        """One optimiser step whose gradient is that of one big batch: all rows of the window on all ranks.

        Every row's summed token loss is divided by the global count of target tokens, so neither how samples are
        spread over rows, micro-batches and ranks nor padding weighs into the mean. Rows may differ in number per rank.
        Raises NonFiniteError; the weights are then untouched.
        """
        return self._follow_gradient(training, self._queue_gradient(training, window, number, waited)).stats

    def _queue_gradient(self, training: Training, window: Sequence[Batch], number: int, waited: float) -> WindowSums:
        """The first half of a step: forward and backward of every row. The host waits for nothing."""
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
        return WindowSums(window, number, learning_rate, waited, torch.stack(losses)[: len(window)], counts)

    def _follow_gradient(self, training: Training, sums: WindowSums) -> Figures:
        """The second half: clip, then one step of the optimiser, or none where the figures forbid it."""
        norm = self._unscaled_norm(training)
        stop = torch.full((), float(training.stop_requested()), dtype=torch.float64, device=norm.device)
        votes = training.dist.sum(torch.stack([sums.row_losses.sum(), stop]))
        scale = training.scaler.scale(torch.ones((), device=norm.device))  # as a number it would be waited for
        values = torch.cat([votes[:1], sums.counts.double(), torch.stack([norm.double(), scale.double()]), votes[1:]])
        figures = Figures(training, sums, values)
        if training.defer and training.optimizer.state:  # the first step makes the moments
            step_unless(training.optimizer, figures.is_unusable)
        elif not figures.stats.is_skipped and math.isfinite(figures.stats.grad_norm):
            training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.zero_grad(set_to_none=True)
        training.clock.mark("optimizer")
        training.clock.stop()
        return figures

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


def _drop_gradient(training: Training) -> None:
    """A window whose gradient is queued was not trained."""
    training.optimizer.zero_grad(set_to_none=True)
    training.clock.drop()


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
