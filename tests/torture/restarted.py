"""One rank for torchrun: ``python -m tests.torture.restarted <folder> <windows>``; the last rank is killed.

windows: after which window of the first start, the second one, ...; '' = never.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from minigpt4.cli import report_errors
from minigpt4.common import dist
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import tiny_config


def main() -> int:
    torch.set_num_threads(1)
    kills = [int(window) for window in sys.argv[2].split(",") if window]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    cfg = tiny_config(Path(sys.argv[1]), dropout=0.3, save_every=4, resume_ckpt_path="auto", dist_timeout=60.0)
    context = dist.init(cfg.run)
    after_window = RunnerBase._after_window

    def after(self: RunnerBase, number: int, stats: Any) -> bool:
        goes_on = after_window(self, number, stats)
        if context.rank == context.world_size - 1 and kills[start : start + 1] == [number + 1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return goes_on

    RunnerBase._after_window = after  # type: ignore[method-assign]
    with context.naming_lost_ranks():
        code = RunnerBase(cfg, context).train()
    context.close()
    return code


if __name__ == "__main__":
    sys.exit(report_errors(main))
