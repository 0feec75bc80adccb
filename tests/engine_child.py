"""One training process for tests: ``python -m tests.engine_child <folder> <json of settings>``.

kill_at: SIGKILL to this process in the middle of the window after this one. term_at: SIGTERM to rank 1 there.
uneven: rank 1 splits its first micro-batch into two rows, so that ranks run a different number of rows.
What happened stands in the job folder's log.txt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minigpt4.common import dist
from minigpt4.common.types import IGNORE_INDEX, Batch
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import TinyModel, tiny_config


def _part(batch: Batch, rows: slice) -> Batch:
    labels = batch.labels[rows]
    return replace(
        batch,
        input_ids=batch.input_ids[rows],
        position_ids=batch.position_ids[rows],
        labels=labels,
        images=batch.images[rows],  # one image per sample
        lengths=batch.lengths[rows],
        num_target_tokens=int((labels != IGNORE_INDEX).sum()),
        sample_ids=batch.sample_ids[rows],
        num_image_positions=-1,
    )


class _Uneven(torch.utils.data.Dataset[list[Batch]]):
    def __init__(self, windows: Any) -> None:
        self._windows = windows

    def __getitem__(self, index: int) -> list[Batch]:
        first, *others = self._windows[index]
        return [_part(first, slice(0, 1)), _part(first, slice(1, None)), *others]


def main() -> None:
    torch.set_num_threads(1)
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    kill_at, term_at = settings.pop("kill_at", None), settings.pop("term_at", None)
    is_uneven = settings.pop("uneven", False)
    cfg = tiny_config(folder, **settings)
    context = dist.init(cfg.run)
    runner = RunnerBase(cfg, context)
    if is_uneven and context.rank == 1:
        runner.windows = _Uneven(runner.windows)  # type: ignore[assignment]
    forward = TinyModel.forward

    def signalled(model: TinyModel, batch: Batch) -> object:
        if runner.progress.window == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if runner.progress.window == term_at and context.rank == 1 and not runner.stop.requested():
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, batch)

    TinyModel.forward = signalled  # type: ignore[assignment,method-assign]
    code = runner.train()
    context.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
