"""One training process for tests: ``python -m tests.engine_child <folder> <json of settings>``.

kill_at: SIGKILL to this process at the start of the window after this one. term_at: SIGTERM to rank 1 there.
uneven: rank 1 splits its first micro-batch into two rows, so that ranks run a different number of rows.
again: a folder and further settings of a second run, whose figures are read late (``Training.defer``).
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
from minigpt4.tasks.base_task import BaseTask, Training
from tests.engine_parts import tiny_config


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


def run(folder: Path, settings: dict[str, Any], context: dist.DistContext | None, defer: bool) -> tuple[int, Any]:
    settings = dict(settings)
    kill_at, term_at = settings.pop("kill_at", None), settings.pop("term_at", None)
    is_uneven = settings.pop("uneven", False)
    cfg = tiny_config(folder, **settings)
    context = context or dist.init(cfg.run)
    runner = RunnerBase(cfg, context)
    runner.training = replace(runner.training, defer=defer)
    if is_uneven and context.rank == 1:
        runner.windows = _Uneven(runner.windows)  # type: ignore[assignment]
    queue_gradient = BaseTask._queue_gradient

    def signalled(task: BaseTask, training: Training, window: Any, number: int, waited: float) -> object:
        if number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == term_at and context.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return queue_gradient(task, training, window, number, waited)

    BaseTask._queue_gradient = signalled  # type: ignore[assignment,method-assign]
    try:
        return runner.train(), context
    finally:
        BaseTask._queue_gradient = queue_gradient  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    again = settings.pop("again", None)
    code, context = run(folder, settings, None, False)
    if again is not None:
        second, _ = run(Path(again["folder"]), {**settings, **again["settings"]}, context, True)
        assert second == code
    context.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
