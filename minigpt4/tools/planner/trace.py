"""Bytes of one training step, from shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minigpt4.common.types import Batch
from minigpt4.models.base_model import BaseModel
from minigpt4.runners.feature_fill import BATCH
from minigpt4.tasks.base_task import BaseTask
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner.pretend import GpuCalls, MetaOperations, kernel_workspace
from minigpt4.tools.planner.split import Gathering

_CUDA_BLOCK = 512
"""PyTorch's CUDA allocator rounds every size up to a multiple of this."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes above the weights at the fullest moment of an optimiser step, its window's last row.

    inputs: the batch. moments: AdamW's two. gradients: of all that trains, when they exist before the row starts.
    activations: everything else at that moment, gradients of this row included; of a split model also what is gathered.
    """

    inputs: int
    moments: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.inputs + self.moments + self.gradients + self.activations


class _Whole:
    """What ``Gathering`` tells of a split model, of one that every GPU holds."""

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self._trained = trained

    def moments(self) -> list[Tensor]:
        return [torch.empty_like(parameter) for parameter in self._trained for _ in range(2)]

    def accumulate(self) -> None:
        for parameter in self._trained:
            parameter.grad = torch.empty_like(parameter)

    def travelling(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def around(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class StepTracer:
    """Runs training steps of models on the meta device; ``on_gpu``: with a GPU's dtypes, kernels and block sizes."""

    def __init__(self, task: BaseTask, on_gpu: bool) -> None:
        self._task, self._on_gpu = task, on_gpu
        self._operations = MetaOperations(is_step=True)

    def trace(self, model: BaseModel, batch: Batch, has_gradients: bool, shards: int = 1) -> StepBytes:
        """One row forward and backward in train mode, and clipping; the update itself allocates nothing.

        ``batch``: integers on the CPU, images on the meta device. ``has_gradients``: earlier rows of the window, or
        DDP's buckets, have left gradients that this row adds to. ``shards``: ranks that fsdp splits the model over.
        """
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        held = Gathering(model, shards) if shards > 1 else _Whole(trained)
        calls, memory = GpuCalls(self._on_gpu), self._memory()
        with _gpu_autocast_flag(model.dtype != torch.float32), held.travelling(), memory:
            moments = held.moments()
            bytes_of_moments = memory.alive
            if has_gradients:
                held.accumulate()
            bytes_of_gradients = memory.alive - bytes_of_moments
            for tensor in (batch.input_ids, batch.position_ids, batch.labels, batch.images):
                memory.count(tensor)
            before = memory.alive
            with held.around(), calls:
                loss = self._task.loss(model, batch).loss_sum
                calls.end_forward()
                torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, 1.0)
        for parameter in trained:
            parameter.grad = None
        del moments
        inputs = before - bytes_of_moments - bytes_of_gradients
        return StepBytes(inputs, bytes_of_moments, bytes_of_gradients, memory.peak - before)

    def fill(self, model: BaseModel) -> tuple[int, torch.Size]:
        """Bytes above the weights while a batch of the vision cache is computed, and the shape [N, P, C'] it gets."""
        size, memory = model.cfg.image_size, self._memory()
        model.eval()
        with _gpu_autocast_flag(model.dtype != torch.float32), memory, GpuCalls(self._on_gpu), torch.no_grad():
            pixels = torch.empty(BATCH, 3, size, size, device="meta")
            with model.autocast():
                features = model.vision_features(pixels)
            features = features.to(model.dtype)
        return memory.peak, features.shape

    def _memory(self) -> LiveMemory:
        block, workspace = (_CUDA_BLOCK, kernel_workspace) if self._on_gpu else (1, None)
        return LiveMemory(block, workspace, self._operations.run)


@contextlib.contextmanager
def _gpu_autocast_flag(is_on: bool) -> Iterator[None]:
    """peft's quantised layers ask whether CUDA's autocast is on; on meta tensors the flag does nothing else."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", is_on)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)
