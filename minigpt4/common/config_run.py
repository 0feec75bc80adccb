"""The ``run`` section: what it names must exist, and its counts must fit each other and the data sets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from minigpt4.common.config_file import ConfigFile
from minigpt4.common.errors import nearest
from minigpt4.common.legacy_keys import drop_unused
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig, ModelConfig, RunConfig, ValidConfig
from minigpt4.common.section import build_section

log = logging.getLogger(__name__)

TRACKERS = ("terminal", "jsonl", "wandb", "tensorboard")
LOSS = "loss"
"""The one metric that needs no generated answers."""


def read_run(file: ConfigFile) -> RunConfig | None:
    """The section, or None after complaints."""
    content = file.section("run")
    if content is None:
        return None
    runner = file.named("runner", content.get("runner", RunConfig.runner), "run.runner")
    config_class = getattr(runner, "Config", RunConfig)
    drop_unused(file.source, "run", content, [item.name for item in dataclasses.fields(config_class)])
    run: RunConfig | None = build_section(config_class, [(file.source, "run", content)], "run", file.problems)
    if run is None:
        return None
    file.named("task", run.task, "run.task")
    file.named("lr_scheduler", run.lr_sched, "run.lr_sched")
    _check_counts(file, run)
    for name in run.trackers:
        if name not in TRACKERS:
            message = f"unknown tracker '{name}'{nearest(name, TRACKERS)}; known: {', '.join(TRACKERS)}"
            file.complain("run.trackers", message)
    changes: dict[str, Any] = {"valid": _with_pictures(file, run.valid)}
    if run.resume_ckpt_path and run.resume_ckpt_path != "auto" and file.check_data:
        changes["resume_ckpt_path"] = file.path("run.resume_ckpt_path", run.resume_ckpt_path)
    return dataclasses.replace(run, **changes)


def _check_counts(file: ConfigFile, run: RunConfig) -> None:
    if run.iters_per_epoch is None:
        return
    if run.iters_per_epoch < run.accum_grad_iters:
        message = f"an epoch of {run.iters_per_epoch} is shorter than one window of accum_grad_iters"
        file.complain("run.iters_per_epoch", f"{message} {run.accum_grad_iters}; a window is one optimiser step")
    total = run.iters_per_epoch * run.max_epoch
    if run.warmup_steps > total:
        place = file.source.where("run.warmup_steps")
        log.warning(
            "%s: run.warmup_steps: %d is longer than the run of %d iterations; init_lr is never reached",
            place, run.warmup_steps, total,
        )  # fmt: skip


def _with_pictures(file: ConfigFile, valid: ValidConfig) -> ValidConfig:
    """``valid`` with the pictures of canaries as absolute paths."""
    if not file.check_data:
        return valid
    canaries = []
    for number, canary in enumerate(valid.canaries):
        key = f"run.valid.canaries.{number}"
        if not canary.question and not any(name.startswith(key) for name in file.problems.keys):
            file.complain(key, "needs a question")
        image = canary.image and file.path(f"{key}.image", canary.image)
        canaries.append(dataclasses.replace(canary, image=image))
    return dataclasses.replace(valid, canaries=canaries)


def check_parallel(file: ConfigFile, model: ModelConfig | None, run: RunConfig | None) -> None:
    """Weights of bitsandbytes are one piece per layer, with scales beside them: they cannot be split over ranks."""
    if model is None or run is None or run.parallel != "fsdp":
        return
    for key in ("low_resource", "load_in_4bit"):
        if getattr(model, key):
            message = f"fsdp cannot split the quantised weights of model.{key}; set that to False (bf16 weights,"
            file.complain("run.parallel", f"{message} split over the ranks), or parallel to ddp")


def check_validation(file: ConfigFile, run: RunConfig | None, datasets: Mapping[str, DatasetConfig]) -> None:
    """Metrics are registered, and what is measured has a held-out part to be measured on."""
    if run is None:
        return
    valid, key = run.valid, "run.valid"
    known = [LOSS, *registry.names("metric")]
    unknown = [name for name in valid.metrics if name not in known]
    for name in unknown:
        message = f"unknown metric '{name}'{nearest(name, known)}; known: {', '.join(known)}"
        file.complain(f"{key}.metrics", message)
    if unknown or not file.check_data:
        return
    held_out = [name for name, cfg in datasets.items() if cfg.has_held_out and cfg.sample_ratio != 0]
    is_asked = valid.every is not None or valid.patience or valid.metrics != [LOSS] or valid.best_by
    if is_asked and not held_out:
        hint = "write val: {fraction: 0.1} or val: {ann_path: ...} in a data set that is drawn"
        file.complain(key, f"there is nothing to validate on: no data set holds anything out; {hint}")
    _, _, name = valid.best_by.partition("/")
    if name and held_out and name not in held_out:
        message = f"'{name}' holds nothing out{nearest(name, held_out)}; held-out parts: {', '.join(held_out)}"
        file.complain(f"{key}.best_by", message)
