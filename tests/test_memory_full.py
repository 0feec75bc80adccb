"""A GPU that is full ends a run with one message that says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.cli import report_errors
from minigpt4.common.dist import single
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.tasks.memory import MemoryFullError, memory_full
from tests.engine_parts import tiny_config
from tests.plan_parts import language_model as language_model
from tests.plan_parts import model_config, run_config

TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.60 GiB of which 1.10 GiB is free."
    " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF. See documentation for more"
)


def test_the_row_that_was_too_much_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = RunnerBase(tiny_config(tmp_path), single("cpu"))
    forward, calls = runner.model.forward, []

    def full(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            raise torch.OutOfMemoryError(TEXT)
        return forward(batch)

    monkeypatch.setattr(runner.model, "forward", full)
    assert report_errors(runner.train) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]  # not the log
    rows, positions = calls[-1].input_ids.shape
    assert re.fullmatch(
        rf"error: out of memory in window \d+, row \d of \d: {rows} x {positions} positions, .* target tokens", lines[0]
    )
    assert lines[1] == f"error: {TEXT.partition(' If reserved')[0]}"
    assert lines[-1].endswith(f"minigpt4 plan --cfg-path {runner.job_dir / 'config.yaml'}")
    assert (runner.job_dir / "config.yaml").is_file()


def test_a_full_gpu_elsewhere_in_a_window_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = RunnerBase(tiny_config(tmp_path), single("cpu"))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(TEXT)

    monkeypatch.setattr(runner.training.optimizer, "step", full)
    with pytest.raises(MiniGPT4Error, match="^out of memory in window 1\n"):
        runner.train()


def options_of(error: MemoryFullError) -> list[str]:
    return [line.split("--options ")[1] for line in str(error).splitlines() if "--options" in line]


def test_options_come_in_the_order_of_their_price(language_model: Path) -> None:
    cfg = run_config(model_config(language_model, "minigpt_v2", max_txt_len=200), recompute="mlp", packing="packed")
    error = memory_full(cfg, Path("job/config.yaml"), "window 1", torch.device("cpu"), torch.OutOfMemoryError(TEXT))
    assert options_of(error) == [
        "run.row_tokens=2048", "run.recompute=full", "model.load_in_4bit=True", "model.max_txt_len=100",
    ]  # fmt: skip
    cfg = run_config(model_config(language_model, "minigpt_v2", low_resource=True, llama_weights=""), packing="padded")
    error = memory_full(cfg, Path("job/config.yaml"), "window 1", torch.device("cpu"), torch.OutOfMemoryError(TEXT))
    assert options_of(error)[:4] == [
        "datasets.faces.batch_size=1 run.accum_grad_iters=2", "run.recompute=mlp", "run.recompute=full",
        "model.load_in_4bit=True model.low_resource=False",
    ]  # fmt: skip


def test_a_gpu_is_described_with_the_card_that_the_planner_takes(
    language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu:
        total_memory = 25_400_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 23_100_000_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 24_200_000_000)
    cfg = run_config(model_config(language_model, "minigpt_v2"))
    error = memory_full(cfg, Path("a b/config.yaml"), "window 9", torch.device("cuda"), torch.OutOfMemoryError(TEXT))
    assert "now allocated 23.10 GB, reserved by PyTorch 24.20 GB, the GPU has 25.40 GB" in str(error)
    command = "minigpt4 plan --cfg-path 'a b/config.yaml' --gpu 24.8"
    assert str(error).endswith(command)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cfg = run_config(model_config(language_model, "minigpt_v2"), parallel="fsdp", shard_over="node")
    error = memory_full(cfg, Path("a b/config.yaml"), "window 9", torch.device("cuda"), torch.OutOfMemoryError(TEXT), 4)
    assert str(error).endswith(f"{command} --gpus 4 --gpus-per-node 2")
