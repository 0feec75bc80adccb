"""What ``auto`` comes to: ``run.recompute`` for the GPU that is there, ``model.cache_vision`` for the run's passes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from minigpt4.common.dist import DistContext
from minigpt4.common.schema import Config
from minigpt4.common.sharding import ranks_per_node
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import why_not_frozen
from minigpt4.runners.vision_cache import LEAST_PASSES
from minigpt4.tools.planner.estimate import Planner
from minigpt4.tools.planner.lengths import Assumed, find_rows
from minigpt4.tools.planner.report import gigabytes
from minigpt4.tools.planner.skeleton import POLICIES, Variant, configured_variant
from minigpt4.tools.planner.split import Ranks
from minigpt4.tools.planner.workload import Row, SetLengths, Window

log = logging.getLogger(__name__)


def settle_recompute(cfg: Config, dist: DistContext) -> Config:
    """``cfg`` with ``run.recompute`` none, mlp or full; unchanged unless it says auto.

    Every process of a run decides for its own GPU; none on a CPU. Raises ConfigError as building the model would.
    """
    if cfg.run.recompute != "auto":
        return cfg
    policy = "none"
    if dist.device.type == "cuda":
        usable = torch.cuda.get_device_properties(dist.device).total_memory
        planner = Planner(cfg, on_gpu=True, ranks=ranks_of(cfg, dist))
        variant = configured_variant(cfg, True, planner.ranks)
        model = planner.skeleton(variant)
        sets, window, row = find_rows(cfg, model, Assumed(None, None, can_encode=True), dist.world_size)
        variants = [variant]
        if passes_for_auto(cfg, model, sets, window):  # what does not fit the disk is not cached
            variants.append(replace(variant, cached=True))
        policy, total = choose(planner, row, usable, variants)
        log.info("run.recompute auto: %s; predicted peak %s of %s", policy, gigabytes(total), gigabytes(usable))
    return replace(cfg, run=replace(cfg.run, recompute=policy))


def choose(planner: Planner, row: Row, usable: int, variants: Sequence[Variant] = ()) -> tuple[str, int]:
    """The policy that costs least time among those that fit ``usable`` bytes, else the smallest; its predicted peak.

    variants: between which the run decides later, so that all must fit; none: the configured one.
    """
    starts = variants or [configured_variant(planner.cfg, planner.on_gpu, planner.ranks)]
    for policy in POLICIES:
        estimates = [planner.estimate(replace(variant, recompute=policy), row) for variant in starts]
        if all(estimate.fits(usable) for estimate in estimates):
            break
    return policy, max(estimate.total for estimate in estimates)


def ranks_of(cfg: Config, dist: DistContext) -> Ranks:
    """The GPUs of a run that has started."""
    over_nodes = cfg.run.parallel == "fsdp" and cfg.run.shard_over == "node" and dist.world_size > 1
    return Ranks(dist.world_size, ranks_per_node(os.environ, dist.world_size) if over_nodes else 0)


def passes_for_auto(cfg: Config, model: BaseModel, sets: Sequence[SetLengths], window: Window) -> float:
    """Passes over the data for which ``cache_vision: auto`` keeps features; 0: it says something else, is impossible,
    or finds the run too short, or its length is unknown."""
    if cfg.model.cache_vision != "auto" or why_not_frozen(model):
        return 0.0
    sizes = [item.size for item in sets if item.size is not None]
    passes = 0.0
    if window.steps is not None and len(sizes) == len(sets):
        passes = window.steps * window.samples / sum(sizes)
    elif cfg.run.iters_per_epoch is None:
        passes = float(cfg.run.max_epoch)  # an epoch is one pass
    return passes if passes >= LEAST_PASSES else 0.0
