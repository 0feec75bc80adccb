"""``--dry-run``: everything a run checks and says before its first window, without weights and without writing."""

from __future__ import annotations

import logging
import os

import torch

from minigpt4.common.config_run import LOSS
from minigpt4.common.dist import DistContext, single
from minigpt4.common.logger import build_trackers
from minigpt4.common.optim import find_schedule
from minigpt4.common.schema import Config
from minigpt4.runners import overview, sanity
from minigpt4.runners.parts import (
    build_datasets,
    build_model,
    build_sampler,
    choose_packing,
    choose_precision,
    describe_rows,
    make_plan,
    settle_layers,
)
from minigpt4.runners.vision_cache import show_prediction

log = logging.getLogger(__name__)


def dry_run(cfg: Config) -> int:
    """The header of the run that ``cfg`` describes; returns the exit code. Reads data, but no weights.

    Under torchrun every number is that of all ranks. Raises the errors the run would raise before it trains.
    """
    run = cfg.run
    find_schedule(run)
    build_trackers(run.trackers)
    device = single(run.device).device
    precision = choose_precision(run.precision, device)
    model = build_model(cfg, torch.device("meta"), precision)
    datasets = build_datasets(cfg, model, "train")
    held_out = build_datasets(cfg, model, "val")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    sampler = build_sampler(cfg, datasets, DistContext(0, world_size, 0, device))
    plan = make_plan(cfg, datasets, sampler, world_size)
    surveys = overview.survey(datasets, model.encoder, run.seed)
    overview.show(surveys, sampler, plan, world_size, model)
    for dataset in held_out:
        log.info("held out %s: %d samples, measured by %s", dataset.name, len(dataset), ", ".join(run.valid.metrics))
    if not held_out and run.valid.metrics == [LOSS]:
        log.info("nothing is held out; val: {fraction: 0.1} in a data set measures how well answers generalise")
    sanity.warn_of_cuts(surveys)
    sanity.report(run.sanity, [*sanity.check_labels(surveys, model.encoder), *sanity.check_image_size(cfg)])
    rows = describe_rows(run, choose_packing(run.packing, model), model)
    layers = f"LLM layers {settle_layers(run, model, plan, DistContext(0, 1, 0, device)).why}"
    log.info("precision %s; %s; %s; device %s", str(precision).removeprefix("torch."), rows, layers, device)
    show_prediction(cfg, model, [*datasets, *held_out])
    log.info("dry run: no weights were read, nothing was trained, nothing was written")
    return 0
