"""Bytes of one training step, from shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from minigpt4.common.types import Batch
from minigpt4.tasks.base_task import BaseTask
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner.pretend import GpuCalls, MetaOperations, kernel_workspace

_CUDA_BLOCK = 512
"""PyTorch's CUDA allocator rounds every size up to a multiple of this."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes above the weights at the fullest moment of an optimiser step, its window's last row.

    inputs: the batch. moments: AdamW's two. gradients: of all that trains, when they exist before the row starts.
    activations: everything else at that moment, gradients of this row included.
    """

    inputs: int
    moments: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.inputs + self.moments + self.gradients + self.activations


class StepTracer:
    """Runs training steps of models on the meta device; ``on_gpu``: with a GPU's dtypes, kernels and block sizes."""

    def __init__(self, task: BaseTask, on_gpu: bool) -> None:
        self._task, self._on_gpu = task, on_gpu
        self._operations = MetaOperations(is_step=True)

    def trace(self, model: nn.Module, dtype: torch.dtype, batch: Batch, has_gradients: bool) -> StepBytes:
        """One row forward and backward in train mode, and clipping; the update itself allocates nothing.

        ``dtype``: of the model's arithmetic. ``batch``: integers on the CPU, images on the meta device.
        ``has_gradients``: earlier rows of the window, or DDP's buckets, have left gradients that this row adds to.
        """
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        calls = GpuCalls(self._on_gpu)
        block, workspace = (_CUDA_BLOCK, kernel_workspace) if self._on_gpu else (1, None)
        memory = LiveMemory(block, workspace, self._operations.run)
        with _gpu_autocast_flag(dtype != torch.float32), memory:
            moments = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
            bytes_of_moments = memory.alive
            for parameter in trained if has_gradients else ():
                parameter.grad = torch.empty_like(parameter)
            bytes_of_gradients = memory.alive - bytes_of_moments
            for tensor in (batch.input_ids, batch.position_ids, batch.labels, batch.images):
                memory.count(tensor)
            before = memory.alive
            with calls:
                loss = self._task.loss(model, batch).loss_sum
                calls.end_forward()
                torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, 1.0)
        for parameter in trained:
            parameter.grad = None
        del moments
        inputs = before - bytes_of_moments - bytes_of_gradients
        return StepBytes(inputs, bytes_of_moments, bytes_of_gradients, memory.peak - before)


@contextlib.contextmanager
def _gpu_autocast_flag(is_on: bool) -> Iterator[None]:
    """peft's quantised layers ask whether CUDA's autocast is on; on meta tensors the flag does nothing else."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", is_on)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)
