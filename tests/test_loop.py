"""One window: the gradient of one big batch, stops on numbers that are none, and frees what it used."""

from __future__ import annotations

import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt4.common.types import IGNORE_INDEX, Batch
from minigpt4.tasks.base_task import row_seed
from minigpt4.tasks.figures import NonFiniteError, StepStats
from tests.engine_parts import TASK, Bench


def _gradients(bench: Bench, window: list[Batch]) -> tuple[StepStats, dict[str, Tensor]]:
    """Statistics and gradients of a step; gradients are caught before they are dropped."""
    caught: dict[str, Tensor] = {}

    def catch(*_: object) -> None:
        caught.update({name: p.grad.clone() for name, p in bench.model.named_parameters() if p.grad is not None})

    handle = bench.training.optimizer.register_step_pre_hook(catch)
    stats = TASK.train_step(bench.training, window, 0)
    handle.remove()
    return stats, caught


def test_window_of_two_equals_one_big_batch(tmp_path: Path) -> None:
    split, whole = Bench(tmp_path, accumulation=2), Bench(tmp_path)
    # rows of 1 and 4 samples with answers of different length: a mean of means would differ
    left, left_grads = _gradients(split, [split.batch(3), split.batch(0, 1, 2, 4)])
    right, right_grads = _gradients(whole, [whole.batch(3, 0, 1, 2, 4)])
    assert left.target_tokens == right.target_tokens
    assert left.loss == pytest.approx(right.loss, abs=1e-6)
    assert left.grad_norm == pytest.approx(right.grad_norm, abs=1e-6)
    assert set(left_grads) == set(right_grads) and len(left_grads) == 6
    for name, grad in left_grads.items():
        torch.testing.assert_close(grad, right_grads[name], atol=1e-6, rtol=0)


def test_loss_is_the_mean_over_target_tokens(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    batch = bench.batch(0, 1)
    with torch.no_grad():
        expected = float(bench.model(batch).loss_sum) / batch.num_target_tokens
    stats = TASK.train_step(bench.training, [batch], 0)
    assert stats.loss == pytest.approx(expected, abs=1e-6)
    assert (stats.samples, stats.target_tokens) == (2, batch.num_target_tokens)


def test_loss_falls_over_steps_and_gradients_are_dropped_after_each(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    losses = [TASK.train_step(bench.training, [bench.batch(0, 1, 2)], n).loss for n in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in bench.model.parameters())


def test_clipping_bounds_the_norm_and_reports_the_one_before(tmp_path: Path) -> None:
    free, clipped = Bench(tmp_path), Bench(tmp_path, clip=0.01)
    stats, grads = _gradients(free, [free.batch(0, 1)])
    clipped_stats, clipped_grads = _gradients(clipped, [clipped.batch(0, 1)])
    assert clipped_stats.grad_norm == pytest.approx(stats.grad_norm) and stats.grad_norm > 0.05
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in clipped_grads.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert math.sqrt(sum(float(grad.square().sum()) for grad in grads.values())) == pytest.approx(stats.grad_norm)


def test_learning_rate_is_that_of_the_windows_last_micro_batch(tmp_path: Path) -> None:
    bench = Bench(tmp_path, accumulation=8)
    asked: list[int] = []

    def lr_at(t: int) -> float:
        asked.append(t)
        return 0.5 if t == 15 else 0.0

    stats = TASK.train_step(replace(bench.training, lr_at=lr_at), [bench.batch(0)], 1)
    assert asked == [15]
    assert stats.lr == 0.5 and all(group["lr"] == 0.5 for group in bench.training.optimizer.param_groups)


def test_a_window_without_target_tokens_is_skipped(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    batch = bench.batch(0, 1)
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), num_target_tokens=0)
    before = bench.model.trainable_state()
    stats = TASK.train_step(bench.training, [empty], 0)
    assert stats.is_skipped and math.isnan(stats.loss)
    assert all(torch.equal(before[name], value) for name, value in bench.model.trainable_state().items())
    assert not TASK.train_step(bench.training, [batch], 1).is_skipped


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    bench = Bench(tmp_path, accumulation=2)
    good, bad = bench.batch(0, 1), bench.batch(2)
    bad.images[0, 0, 0, 0] = math.inf
    before = bench.model.trainable_state()
    with pytest.raises(NonFiniteError) as caught:
        TASK.train_step(bench.training, [good, bad], 4)
    message = str(caught.value)
    assert "window 5" in message and "one/2" in message and "one/0" not in message
    assert all(torch.equal(before[name], value) for name, value in bench.model.trainable_state().items())
    saved = torch.load(tmp_path / "nonfinite" / "window_5_rank0.pt", weights_only=True)
    assert torch.equal(saved[1]["input_ids"], bad.input_ids)
    assert json.loads((tmp_path / "nonfinite" / "window_5_rank0.json").read_text())["samples"] == ["one/2"]


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.model.head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        TASK.train_step(bench.training, [bench.batch(0, 1)], 0)


def test_fp16_overflow_halves_the_scale_instead_of_stopping(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    training = replace(bench.training, scaler=scaler)
    before = bench.model.trainable_state()
    bench.model.head.weight.register_hook(lambda grad: grad * 1e10)
    stats = TASK.train_step(training, [bench.batch(0, 1)], 0)
    assert math.isinf(stats.grad_norm) and scaler.get_scale() == 2.0**119
    assert all(torch.equal(before[name], value) for name, value in bench.model.trainable_state().items())


def test_dropout_depends_on_the_place_in_the_run_and_not_on_what_ran_before(tmp_path: Path) -> None:
    first, second = Bench(tmp_path, dropout=0.5), Bench(tmp_path, dropout=0.5)
    torch.manual_seed(1)
    loss = TASK.train_step(first.training, [first.batch(0, 1)], 9).loss
    torch.manual_seed(2)
    torch.rand(100)
    assert TASK.train_step(second.training, [second.batch(0, 1)], 9).loss == loss
    third = Bench(tmp_path, dropout=0.5)
    assert TASK.train_step(third.training, [third.batch(0, 1)], 10).loss != loss
    seeds = {row_seed(seed, window, rank, row) for seed in range(3) for window in range(5) for rank in (0, 1)
             for row in range(4)}  # fmt: skip
    assert len(seeds) == 120


def test_each_rows_graph_is_gone_before_the_next_row_starts(tmp_path: Path) -> None:
    bench = Bench(tmp_path, accumulation=3)
    outputs: list[weakref.ref[object]] = []
    alive_at_start: list[int] = []
    forward = bench.model.forward

    def watched(batch: Batch) -> object:
        alive_at_start.append(sum(ref() is not None for ref in outputs))
        output = forward(batch)
        outputs.append(weakref.ref(output.loss_sum))
        return output

    bench.model.forward = watched  # type: ignore[method-assign,assignment]
    gc.disable()
    try:
        TASK.train_step(bench.training, [bench.batch(0), bench.batch(1), bench.batch(2)], 0)
    finally:
        gc.enable()
    assert alive_at_start == [0, 0, 0]


def test_an_epoch_hands_out_numbers_in_order_and_ends_when_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    windows = iter([[bench.batch(index)] for index in range(6)])
    seen: list[int] = []

    def after(number: int, stats: StepStats) -> bool:
        seen.append(number)
        return number != 7

    assert TASK.train_epoch(bench.training, windows, range(4, 6), after)
    assert not TASK.train_epoch(bench.training, windows, range(6, 9), after)
    assert seen == [4, 5, 6, 7]


def test_validation_is_the_token_mean_without_dropout_and_training_mode_returns(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dropout=0.9)
    batches = [bench.batch(0, 1, 2), bench.batch(3)]
    bench.model.eval()
    with torch.no_grad():
        total = sum(float(bench.model(batch).loss_sum) for batch in batches)
    bench.model.train()
    expected = total / sum(batch.num_target_tokens for batch in batches)
    assert TASK.validate(bench.training, batches) == pytest.approx(expected, abs=1e-6)
    assert bench.model.training
