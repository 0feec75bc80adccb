"""Writes the checkpoints of a run and reads the one it goes on from, whole or split over ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from minigpt4.common.checkpoint import SHARDS, Checkpoint, save_checkpoint, start_shared_draft
from minigpt4.common.files import writing
from minigpt4.common.optim import load_optimizer_state, moments, optimizer_state, parameters_by_name
from minigpt4.common.shard_files import finished, write_shards
from minigpt4.models.base_model import BaseModel
from minigpt4.tasks.base_task import Training

log = logging.getLogger(__name__)


class Saver:
    """Checkpoints of one run. Those of split models are written beside training: at most one at a time is on its way.

    What is on its way has a temporary name. It gets its own when every rank has written its part.
    """

    def __init__(self, training: Training, model: BaseModel, config_text: str, keep_last: int) -> None:
        self._training, self._model = training, model
        self._directory = training.job_dir / "checkpoints"
        self._how: dict[str, Any] = {"config_text": config_text, "keep_last": keep_last}
        self._on_its_way: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._group = training.dist.background_group() if training.is_sharded else None

    def save(self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any], is_best: bool) -> None:
        """Every rank must call it. Whole: written by rank 0 when it returns. Split: copied to host memory then.

        Raises OutputError when the disk takes no more, also for the checkpoint before.
        """
        self.wait()
        if self._training.is_sharded:
            self._save_split(step, state, manifest, is_best)
            return
        dist = self._training.dist
        if dist.is_main:
            self._write(
                step, weights=self._model.trainable_state(), manifest=manifest, is_best=is_best,
                resume={"optimizer": optimizer_state(self._training.optimizer), "state": state},
            )  # fmt: skip
        dist.barrier()

    def wait(self) -> None:
        """Returns when nothing is on its way any more. Raises what kept it from being written."""
        if self._on_its_way is not None:
            pending, self._on_its_way = self._on_its_way, None
            pending.result()

    def _save_split(self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any], is_best: bool) -> None:
        dist = self._training.dist
        draft = start_shared_draft(self._directory, step) if dist.is_main else None
        folder: Path = dist.broadcast_object(None if draft is None else draft.folder)
        weights = self._model.trainable_state(dist.is_main)
        parts = write_shards(folder / SHARDS, moments(self._training.optimizer), self._group)
        if draft is None:
            self._on_its_way = self._thread.submit(self._finish, parts)
            return
        shared = replace(draft, finish=lambda: self._finish(parts))
        self._on_its_way = self._thread.submit(
            self._write, step, weights=weights, manifest=manifest, is_best=is_best, resume={"state": state},
            shared=shared,
        )  # fmt: skip

    def _finish(self, parts: Future[Any]) -> None:
        with writing(self._directory):
            finished(parts)

    def _write(self, step: int, **content: Any) -> None:
        path = save_checkpoint(self._directory, step, **self._how, **content)
        log.info("saved %s%s", path, " (best)" if content["is_best"] else "")


def load_resume(checkpoint: Checkpoint, training: Training) -> dict[str, Any]:
    """Puts moments and scaler back, however many ranks wrote them; returns the counters."""
    optimizer, state = checkpoint.load_resume(parameters_by_name(training.optimizer))
    load_optimizer_state(training.optimizer, optimizer, str(checkpoint.path))
    if training.scaler.is_enabled() and state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    return state
