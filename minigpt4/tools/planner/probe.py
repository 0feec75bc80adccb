"""Two real optimiser steps, to hold a prediction against."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.dist import DistContext, single
from minigpt4.common.errors import ConfigError
from minigpt4.common.optim import build_optimizer
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import feature_shape, frozen_features, release
from minigpt4.runners.feature_fill import BATCH
from minigpt4.runners.parts import build_model
from minigpt4.tasks.base_task import BaseTask, Training
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner.skeleton import Variant
from minigpt4.tools.planner.workload import Row


def find_device(on_gpu: bool) -> DistContext:
    """Where to measure. Raises ConfigError when the plan is for a GPU and none is usable."""
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("--probe measures on a GPU, and none is usable here; the prediction itself needs none")
    return single("cuda" if on_gpu else "cpu")


def measure(cfg: Config, variant: Variant, row: Row, has_weights: bool, dist: DistContext) -> int:
    """Peak bytes of live tensors over two windows of such rows on one device. Values are random, sizes are real.

    With cached vision also over a batch of the filling. Raises ConfigError when a quantised base has no weights to
    quantise.
    """
    cfg = variant.applied(cfg)
    cfg = cfg if has_weights else _with_random_weights(cfg)
    device = dist.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(cfg, device, variant.dtype)
    task: BaseTask = registry.get("task", cfg.run.task)()
    filling = _fill(model) if variant.cached else 0
    images = feature_shape(model) if variant.cached else (3, cfg.model.image_size, cfg.model.image_size)
    if variant.cached:
        release(model)
    batch = row.batch(images, variant.dtype if variant.cached else torch.float32)
    batch = replace(batch, images=torch.randn(batch.images.shape).to(batch.images.dtype))
    window = [batch] * (2 if row.adds_up else 1)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(
            model=model.train(), core=model,
            optimizer=build_optimizer(model.trainable_parameters_by_name(), cfg.run, device),
            scaler=torch.amp.GradScaler(device.type, enabled=variant.dtype == torch.float16),
            lr_at=lambda _: 0.0, dist=dist, accumulation=len(window), clip_grad_norm=cfg.run.clip_grad_norm,
            seed=cfg.run.seed, job_dir=Path(folder), stop_requested=lambda: False,
        )  # fmt: skip
        task.train_step(training, window, 0)  # makes the optimiser's moments: the second window is like all later ones
        if device.type == "cuda":
            task.train_step(training, window, 1)
            return int(torch.cuda.max_memory_allocated(device))
        memory = LiveMemory()
        with memory:
            task.train_step(training, window, 1)
    held = [*model.parameters(), *model.buffers(), batch.input_ids, batch.position_ids, batch.labels, batch.images]
    held += [value for state in training.optimizer.state.values() for value in state.values()]
    return max(filling, memory.peak + _alive(held))


def _fill(model: BaseModel) -> int:
    """Peak bytes while a batch of a vision cache is computed; on a GPU its allocator counts them."""
    pixels = torch.randn(BATCH, 3, model.cfg.image_size, model.cfg.image_size)
    memory = LiveMemory()
    with memory if model.device.type == "cpu" else contextlib.nullcontext():
        frozen_features(model.eval(), pixels)
    return memory.peak + _alive([*model.parameters(), *model.buffers(), pixels]) if model.device.type == "cpu" else 0


def _alive(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)  # a freed vision part is there


def _with_random_weights(cfg: Config) -> Config:
    if cfg.model.low_resource or cfg.model.load_in_4bit:
        raise ConfigError("--probe: random weights cannot be quantised; put the weights of model.llama_model in place")
    changes: dict[str, Any] = {"llama_weights": "random", "vit_weights": "random", "ckpt": ""}
    if "q_former_model" in {item.name for item in fields(cfg.model)}:
        changes["q_former_model"] = "random"
    return replace(cfg, model=replace(cfg.model, **changes))
