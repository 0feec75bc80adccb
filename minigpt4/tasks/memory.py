"""What is told when a GPU's memory does not suffice."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import torch

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.schema import Config
from minigpt4.common.sharding import ranks_per_node
from minigpt4.common.types import Batch


class MemoryFullError(MiniGPT4Error):
    """The GPU ran out of memory; the message says in what, and what to do."""


def describe_row(batch: Batch, number: int, count: int) -> str:
    """Size of one row of a window, for people."""
    rows, positions = batch.input_ids.shape
    return (
        f"row {number + 1} of {count}: {rows} x {positions:,} positions, {len(batch.lengths)} samples "
        f"(longest {max(batch.lengths):,}), {batch.images.shape[0]} images, {batch.num_target_tokens:,} target tokens"
    )


def memory_full(
    cfg: Config, config_file: Path, place: str, device: torch.device, error: Exception, ranks: int = 1
) -> MemoryFullError:
    """The error for the user. ``place``: what was being computed; ``config_file``: the resolved YAML of the run."""
    lines = [f"out of memory in {place}", str(error).split(" See documentation")[0].split(" If reserved")[0]]
    card = []
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        lines.append(
            f"now allocated {allocated / 1e9:.2f} GB, reserved by PyTorch {reserved / 1e9:.2f} GB, "
            f"the GPU has {total / 1e9:.2f} GB"
        )
        card = ["--gpu", f"{total / 1.025e9:.1f}"]
    if ranks > 1:
        card += ["--gpus", str(ranks)]
        if cfg.run.shard_over == "node":
            card += ["--gpus-per-node", str(ranks_per_node(os.environ, ranks))]
    lines.append("what needs less memory, the cheapest first; add one after the other:")
    lines += [f"  --options {option}" for option in _options(cfg)]
    command = shlex.join(["minigpt4", "plan", "--cfg-path", str(config_file), *card])
    lines.append(f"what fits, computed before a run: {command}")
    return MemoryFullError("\n".join(lines))


def _options(cfg: Config) -> list[str]:
    """Settings in the order in which they cost time or quality."""
    run, model = cfg.run, cfg.model
    options = []
    if run.packing != "padded":
        options.append(f"run.row_tokens={max(256, run.row_tokens // 2)}")
    largest = max(cfg.datasets.values(), key=lambda dataset: dataset.batch_size, default=None)
    if run.packing != "packed" and largest is not None and largest.batch_size > 1:
        half = largest.batch_size // 2
        options.append(f"datasets.{largest.name}.batch_size={half} run.accum_grad_iters={2 * run.accum_grad_iters}")
    policies = ("none", "mlp", "full")
    recompute = "full" if model.use_grad_checkpoint_llm else run.recompute
    options += [f"run.recompute={policy}" for policy in policies[policies.index(recompute) + 1 :]]
    if model.freeze_llm and not model.load_in_4bit:
        options.append("model.load_in_4bit=True" + " model.low_resource=False" * model.low_resource)
    options.append(f"model.max_txt_len={max(1, model.max_txt_len // 2)}")
    return options
