"""Schedules against the reference's recorded values, parameter groups, optimiser state by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.optim import (
    build_optimizer,
    find_schedule,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    schedule_plan,
    step_unless,
)
from minigpt4.common.schema import RunConfig

GOLDEN = Path(__file__).parent / "golden"
RECORDED: dict[str, Any] = json.loads((GOLDEN / "lr_schedule" / "lr.json").read_text())
GROUPS: dict[str, Any] = json.loads((GOLDEN / "param_groups" / "groups.json").read_text())
CPU = torch.device("cpu")


def _run(settings: dict[str, Any], **changes: Any) -> tuple[RunConfig, int]:
    iterations = settings["iters_per_epoch"]
    known = ("init_lr", "min_lr", "warmup_lr", "warmup_steps", "max_epoch")
    given = {key: settings[key] for key in known if settings[key] is not None}
    return RunConfig(**{**given, **changes}), iterations


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_cosine_schedule_equals_the_reference_where_its_warmup_does_not_restart(name: str) -> None:
    settings = RECORDED[name]["settings"]
    run, iterations = _run(settings)
    schedule, plan = find_schedule(run), schedule_plan(run, iterations)
    compared = 0
    for epoch, step, expected in RECORDED[name]["rows_epoch_iter_lr"]:
        t = epoch * iterations + step
        if epoch == 0 or t >= run.warmup_steps:
            assert schedule(t, plan) == pytest.approx(expected, rel=1e-12), (epoch, step)
            compared += 1
    assert compared > 20


def test_warmup_goes_on_over_an_epoch_border() -> None:
    name = next(key for key, value in RECORDED.items() if value["settings"]["warmup_steps"] == 1000)
    run, iterations = _run(RECORDED[name]["settings"])
    schedule, plan = find_schedule(run), schedule_plan(run, iterations)
    assert plan.iters_per_epoch == 640
    assert schedule(640, plan) == pytest.approx(1e-6 + (3e-5 - 1e-6) * 0.64)
    assert schedule(999, plan) < schedule(1000, plan) < 3e-5


def test_negative_warmup_lr_starts_at_init_lr() -> None:
    run = RunConfig(init_lr=1e-3, min_lr=1e-5, warmup_lr=-1, warmup_steps=10)
    assert find_schedule(run)(0, schedule_plan(run, 100)) == 1e-3


def test_step_schedule_decays_once_per_epoch_and_stops_at_the_floor() -> None:
    run = RunConfig(lr_sched="linear_warmup_step_lr", init_lr=1.0, min_lr=0.2, lr_decay_rate=0.5, max_epoch=5)
    schedule, plan = find_schedule(run), schedule_plan(run, 10)
    assert [schedule(t, plan) for t in (0, 9, 10, 20, 30, 49)] == [1.0, 1.0, 0.5, 0.25, 0.2, 0.2]


def test_step_schedule_without_decay_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_decay_rate"):
        find_schedule(RunConfig(lr_sched="linear_warmup_step_lr"))


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="linear_warmup_cosine_lr"):
        find_schedule(RunConfig(lr_sched="linear_warmup_cosin_lr"))


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_parameter_groups_equal_the_reference(name: str) -> None:
    decayed, free = GROUPS[name]["weight_decay_0_05"], GROUPS[name]["weight_decay_0"]

    def dimensions(tensor: str) -> int:
        # a norm's weight has one dimension and no telling name; everything else gets two, so that the name decides
        is_vector = "norm" in tensor.lower() or "ln_" in tensor
        return 1 if is_vector else 2

    named = [(tensor, nn.Parameter(torch.zeros([2] * dimensions(tensor)))) for tensor in [*decayed, *free]]
    groups = {group["weight_decay"]: group["names"] for group in parameter_groups(named, 0.05)}
    assert groups[0.05] == decayed
    assert groups.get(0.0, []) == free
    assert GROUPS[name]["hyper"][0]["eps"] == 1e-8


def test_frozen_parameters_get_no_optimiser_state() -> None:
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    trained = nn.Parameter(torch.zeros(2, 2))
    groups = parameter_groups([("frozen", frozen), ("trained", trained)], 0.05)
    assert [group["names"] for group in groups] == [["trained"]]
    with pytest.raises(ConfigError, match="nothing trains"):
        build_optimizer([("frozen", frozen)], RunConfig(), CPU)


def _stepped(names: list[str], steps: int, run: RunConfig) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.full((3, 2), 0.5)) for _ in names]
    optimizer = build_optimizer(zip(names, parameters, strict=True), run, CPU)
    for step in range(steps):
        for place, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (place + 1))
        optimizer.step()
    return optimizer, parameters


def test_optimiser_state_is_put_back_by_name_and_not_by_position() -> None:
    first, parameters = _stepped(["a", "b"], 3, RunConfig(beta2=0.98))
    saved = copy.deepcopy(optimizer_state(first))
    again, others = _stepped(["b", "a"], 0, RunConfig(beta2=0.98))
    load_optimizer_state(again, saved, "here")
    for left, right in zip(parameters, reversed(others), strict=True):
        with torch.no_grad():
            right.copy_(left)
        left.grad = torch.ones_like(left)
        right.grad = torch.ones_like(right)
    first.step()
    again.step()
    for left, right in zip(parameters, reversed(others), strict=True):
        assert torch.equal(left, right)


def test_hyper_parameters_after_a_resume_are_those_of_the_configuration() -> None:
    first, _ = _stepped(["a"], 1, RunConfig(weight_decay=0.05))
    again, _ = _stepped(["a"], 0, RunConfig(weight_decay=0.2))
    load_optimizer_state(again, optimizer_state(first), "here")
    assert again.param_groups[0]["weight_decay"] == 0.2


def test_optimiser_state_of_other_parameters_is_refused() -> None:
    first, _ = _stepped(["a", "b"], 1, RunConfig())
    again, _ = _stepped(["a"], 0, RunConfig())
    with pytest.raises(CheckpointError, match="unknown parameters, first: b"):
        load_optimizer_state(again, optimizer_state(first), "here")


def test_a_step_that_the_device_forbids_changes_no_bit_and_one_it_allows_is_the_plain_step() -> None:
    def step(layer: nn.Linear, optimizer: torch.optim.AdamW, value: float, is_unusable: bool | None) -> None:
        layer.weight.grad, layer.bias.grad = torch.full((70, 3), value), torch.full((70,), value)
        if is_unusable is None:
            optimizer.step()
        else:
            step_unless(optimizer, torch.tensor(is_unusable))

    layers = [nn.Linear(3, 70), nn.Linear(3, 70)]
    layers[1].load_state_dict(layers[0].state_dict())
    plain, guarded = (build_optimizer(layer.named_parameters(), RunConfig(), CPU) for layer in layers)
    for value in (0.1, -0.7, 0.3):
        step(layers[0], plain, value, None)
        step(layers[1], guarded, value, False)
        step(layers[1], guarded, math.nan, True)
    assert not hasattr(guarded, "found_inf")
    expected, found = optimizer_state(plain), optimizer_state(guarded)
    for name, parameter in layers[0].named_parameters():
        assert torch.equal(parameter, layers[1].get_parameter(name))
        assert all(torch.equal(value, found[name][key]) for key, value in expected[name].items())
        assert float(found[name]["step"]) == 3
