"""Parameter groups, AdamW and learning-rate schedules (pure functions of the iteration)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.schema import RunConfig
from minigpt4.common.sharding import like

NO_DECAY_NAMES = ("bias", "ln", "bn")
"""Substrings of names without weight decay (the reference's rule; 'ln' matches anywhere in the name)."""


@dataclass(frozen=True)
class SchedulePlan:
    """What a schedule reads besides t. Counts are micro-batches per rank."""

    init_lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    decay_rate: float
    iters_per_epoch: int
    total_iters: int


LRSchedule = Callable[[int, SchedulePlan], float]


def _warmup(t: int, plan: SchedulePlan) -> float:
    step = (plan.init_lr - plan.warmup_lr) * t / max(plan.warmup_steps, 1)
    return min(plan.init_lr, plan.warmup_lr + step)


@registry.register("lr_scheduler", "linear_warmup_cosine_lr")
def linear_warmup_cosine_lr(t: int, plan: SchedulePlan) -> float:
    """Linear warm-up for ``warmup_steps`` iterations, then a cosine over the whole run, counted from its start.

    The reference's formula, with the warm-up counted over the run instead of restarting every epoch.
    """
    if t < plan.warmup_steps:
        return _warmup(t, plan)
    return plan.min_lr + (plan.init_lr - plan.min_lr) * 0.5 * (1.0 + math.cos(math.pi * t / plan.total_iters))


@registry.register("lr_scheduler", "linear_warmup_step_lr")
def linear_warmup_step_lr(t: int, plan: SchedulePlan) -> float:
    """Linear warm-up for ``warmup_steps`` iterations, then times ``lr_decay_rate`` per epoch, down to ``min_lr``."""
    if t < plan.warmup_steps:
        return _warmup(t, plan)
    return max(plan.min_lr, plan.init_lr * plan.decay_rate ** (t // plan.iters_per_epoch))


def find_schedule(run: RunConfig) -> LRSchedule:
    """The function ``run.lr_sched`` names. Raises ConfigError when its keys are missing."""
    schedule: LRSchedule = registry.get("lr_scheduler", run.lr_sched)
    if schedule is linear_warmup_step_lr and run.lr_decay_rate is None:
        raise ConfigError("run.lr_sched 'linear_warmup_step_lr' needs run.lr_decay_rate (a number in 0..1)")
    return schedule


def schedule_plan(run: RunConfig, iters_per_epoch: int) -> SchedulePlan:
    """The numbers of ``run`` a schedule reads; a negative ``warmup_lr`` means ``init_lr``."""
    return SchedulePlan(
        init_lr=run.init_lr,
        min_lr=run.min_lr,
        warmup_lr=run.warmup_lr if run.warmup_lr >= 0 else run.init_lr,
        warmup_steps=run.warmup_steps,
        decay_rate=1.0 if run.lr_decay_rate is None else run.lr_decay_rate,
        iters_per_epoch=iters_per_epoch,
        total_iters=run.max_epoch * iters_per_epoch,
    )


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not: no decay for fewer than two dimensions or a name that holds bias, ln or bn.

    ``parameters``: canonical names. Frozen ones are left out; an empty group is left out.
    """
    decayed: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay}
    free: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        is_free = parameter.ndim < 2 or any(part in name for part in NO_DECAY_NAMES)
        group = free if is_free else decayed
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in (decayed, free) if group["params"]]


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], run: RunConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over what trains in ``parameters``, fused on CPU and CUDA. Raises ConfigError when nothing does."""
    groups = parameter_groups(parameters, run.weight_decay)
    if not groups:
        raise ConfigError("nothing trains: every parameter is frozen (model.freeze_*, model.lora_r)")
    return torch.optim.AdamW(
        groups, lr=run.init_lr, betas=(0.9, run.beta2), eps=1e-8, fused=device.type in ("cpu", "cuda")
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def step_unless(optimizer: torch.optim.Optimizer, is_unusable: Tensor) -> None:
    """One step of a fused optimiser, or none where ``is_unusable``, a bool on its device; the host does not wait.

    Without one, weights, moments and step counts keep every bit; with one, they get those of ``optimizer.step()``.
    The kernels of fused optimisers leave everything alone where ``found_inf``, made for loss scaling, is 1.
    """
    optimizer.found_inf = is_unusable.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def parameters_by_name(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """What ``optimizer`` trains, by canonical name."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def moments(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Moments and step counts by canonical name (positions change with a refactor), as they are and where they are."""
    named = parameters_by_name(optimizer).items()
    return {name: dict(optimizer.state[parameter]) for name, parameter in named if parameter in optimizer.state}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The same on the CPU; shares memory there."""
    return {
        name: {key: value.detach().cpu() for key, value in state.items()} for name, state in moments(optimizer).items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]], source: str
) -> None:
    """Put ``state`` back; hyper-parameters stay those of the present configuration.

    Whole moments of parameters that are split over ranks are split as these are.
    Raises CheckpointError when the state belongs to other parameters or shapes.
    """
    parameters = parameters_by_name(optimizer)
    strangers = sorted(set(state) - set(parameters))
    if strangers:
        raise CheckpointError(
            f"{source}: optimiser state of {len(strangers)} unknown parameters, first: {strangers[0]}"
        )
    for name, parameter in parameters.items():
        if name in state and state[name]["exp_avg"].shape != parameter.shape:
            raise CheckpointError(
                f"{source}: optimiser state of {name} has shape {list(state[name]['exp_avg'].shape)}, "
                f"the parameter {list(parameter.shape)}"
            )
    own = optimizer.state_dict()
    indexed = {
        index: {key: like(value, parameter) for key, value in state[name].items()}
        for index, (name, parameter) in enumerate(parameters.items())
        if name in state
    }
    optimizer.load_state_dict({"state": indexed, "param_groups": own["param_groups"]})
