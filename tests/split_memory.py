"""Bytes of a training step of a model that ``fully_shard`` has split, measured in one of its ranks."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minigpt4.common.dist import DistContext, sync_gradients
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config
from minigpt4.common.sharding import make_mesh
from minigpt4.models.frozen_vision import feature_shape, release
from minigpt4.models.split_model import place_around_llm, split
from minigpt4.runners.parts import build_model
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner.skeleton import Variant
from minigpt4.tools.planner.workload import Row


class ResizedMemory(LiveMemory):
    """Also sees storages that FSDP2 empties and fills again, at the next operation."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[Any]] = {}
        self.most = 0

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        storages = {key: reference() for key, reference in self._seen.items()}
        self._seen = {key: self._seen[key] for key, storage in storages.items() if storage is not None}
        self.most = max(self.most, sum(storage.nbytes() for storage in storages.values() if storage is not None))
        return result


def local_bytes(tensor: Tensor) -> int:
    """Of this rank's part, with its padding."""
    if tensor.is_meta:
        return 0
    return tensor.to_local().untyped_storage().nbytes() if isinstance(tensor, DTensor) else tensor.nbytes


def measure_split(cfg: Config, variant: Variant, row: Row, dist: DistContext) -> tuple[int, int]:
    """Peak bytes of a window whose moments exist already, weights among them; bytes of the weights.

    A process group must be there. Whatever its backend sends, sizes are real.
    """
    model = build_model(variant.applied(cfg), torch.device("cpu"), variant.dtype)
    place_around_llm(model, dist.device)
    images = feature_shape(model) if variant.cached else (3, cfg.model.image_size, cfg.model.image_size)
    if variant.cached:
        release(model)
    split(model.train(), make_mesh(dist, cfg.run.shard_over))
    task: Any = registry.get("task", cfg.run.task)()
    batch = row.batch(images)
    window = [replace(batch, images=torch.randn(batch.images.shape))] * (2 if row.adds_up else 1)
    weights = sum(map(local_bytes, [*model.parameters(), *model.buffers()]))
    moments = 2 * sum(local_bytes(p) for p in model.parameters() if p.requires_grad)
    memory = ResizedMemory()
    with memory:
        for number, item in enumerate(window):
            with sync_gradients(model, number == len(window) - 1, is_sharded=True):
                torch.autograd.backward(task.loss(model, item).loss_sum)
    held = sum(tensor.nbytes for tensor in (batch.input_ids, batch.position_ids, batch.labels, window[0].images))
    gradients: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    assert not gradients, "something trains that got no gradient"
    return memory.most + weights + moments + held, weights
