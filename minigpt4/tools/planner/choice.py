"""``run.recompute: auto``: the policy for the GPU that is there, chosen before the model is built."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from minigpt4.common.dist import DistContext
from minigpt4.common.schema import Config
from minigpt4.tools.planner.estimate import Planner
from minigpt4.tools.planner.lengths import Assumed, find_rows
from minigpt4.tools.planner.report import gigabytes
from minigpt4.tools.planner.skeleton import POLICIES, configured_variant
from minigpt4.tools.planner.workload import Row

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
        planner = Planner(cfg, on_gpu=True)
        model = planner.skeleton(configured_variant(cfg, on_gpu=True))
        *_, row = find_rows(cfg, model, Assumed(None, None, can_encode=True), dist.world_size)
        policy, total = choose(planner, row, usable)
        log.info("run.recompute auto: %s; predicted peak %s of %s", policy, gigabytes(total), gigabytes(usable))
    return replace(cfg, run=replace(cfg.run, recompute=policy))


def choose(planner: Planner, row: Row, usable: int) -> tuple[str, int]:
    """The policy that costs least time among those that fit ``usable`` bytes, else the smallest; its predicted peak."""
    variant = configured_variant(planner.cfg, planner.on_gpu)
    for policy in POLICIES:
        estimate = planner.estimate(replace(variant, recompute=policy), row)
        if estimate.fits(usable):
            break
    return policy, estimate.total
