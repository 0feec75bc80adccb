"""Owns time: builds every part of a run once, in order, then trains, validates, saves and resumes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch.utils.data import DataLoader

from minigpt4.common import schema
from minigpt4.common.checkpoint import Checkpoint, save_checkpoint
from minigpt4.common.config import dump_config
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import CheckpointError, MiniGPT4Error
from minigpt4.common.logger import Pace, RunInfo, WindowRecord, build_trackers, draw_curve
from minigpt4.common.optim import build_optimizer, find_schedule, load_optimizer_state, optimizer_state, schedule_plan
from minigpt4.common.registry import registry
from minigpt4.common.types import Batch
from minigpt4.datasets.collate import WindowDataset
from minigpt4.runners import job
from minigpt4.runners.parts import (
    ValidationBatches,
    build_datasets,
    build_model,
    build_sampler,
    choose_packing,
    choose_precision,
    make_plan,
    memory_gb,
    print_header,
    raise_file_limit,
    report_parts,
)
from minigpt4.tasks.base_task import BaseTask, StepStats, Training

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What changes while training; goes into ``resume/state.json``."""

    window: int = 0
    skipped: int = 0
    best: float | None = None
    loss: float = math.nan


@registry.register("runner", "runner_base")
class RunnerBase:
    """``run.runner: runner_base``."""

    Config: ClassVar[type[schema.RunConfig]] = schema.RunConfig

    def __init__(self, cfg: schema.Config, dist: DistContext) -> None:
        """Builds everything. Raises ConfigError, DataError or CheckpointError before the first window."""
        run = cfg.run
        self.cfg, self.dist = cfg, dist
        self.stop = job.StopSignals()
        schedule = find_schedule(run)
        self.trackers = build_trackers(run.trackers)
        self.task: BaseTask = registry.get("task", run.task)()
        checkpoint = job.find_resume(cfg, dist)
        precision = choose_precision(run.precision, dist.device)

        torch.manual_seed(run.seed)
        self.model = build_model(cfg, dist.device, precision)
        report_parts(self.model)
        wrapped = dist.wrap(self.model)

        packing = choose_packing(run.packing, self.model)
        self.datasets = build_datasets(cfg, self.model, "train")
        self.val_datasets = build_datasets(cfg, self.model, "val")
        self.sampler = build_sampler(cfg, self.datasets, dist)
        self.windows = WindowDataset(self.datasets, self.sampler, self.model.encoder, packing, run.row_tokens, run.seed)
        self.plan = make_plan(cfg, self.datasets, self.sampler, dist.world_size)

        lr_plan = schedule_plan(run, self.plan.iters_per_epoch)
        optimizer = build_optimizer(self.model.trainable_parameters_by_name(), run, dist.device)
        scaler = torch.amp.GradScaler(dist.device.type, enabled=precision == torch.float16)
        is_same_job = checkpoint is not None and job.continues_job(checkpoint)
        self.job_dir = checkpoint.path.parent.parent if checkpoint and is_same_job else job.create_job_dir(cfg, dist)
        self.training = Training(
            model=wrapped, core=self.model, optimizer=optimizer, scaler=scaler,
            lr_at=lambda t: schedule(t, lr_plan), dist=dist, accumulation=run.accum_grad_iters,
            clip_grad_norm=run.clip_grad_norm, seed=run.seed, job_dir=self.job_dir, stop_requested=self.stop.requested,
        )  # fmt: skip
        self.progress = Progress() if checkpoint is None else self._resume(checkpoint)
        self.manifest = job.describe_run(cfg, dist, self._data_facts())
        if checkpoint is not None:
            self.manifest["resumed_from"] = str(checkpoint.path)
        self._last_saved = self.progress.window if is_same_job else -1
        self.pace = Pace()
        if dist.is_main:
            print_header(self.datasets, self.sampler, self.plan, dist.world_size, self.model.encoder, run.seed)
            count = sum(parameter.numel() for parameter in self.training.parameters)
            place = f"{packing} rows; device {dist.device}; job {self.job_dir}"
            log.info("trainable parameters %d; precision %s; %s", count, str(precision).removeprefix("torch."), place)

    def train(self) -> int:
        """The whole run from where it stands. Returns the exit code: 0, or 128 + signal after a stop."""
        first, total = self.progress.window, self.plan.total_windows
        if self.cfg.run.evaluate:
            for name, value in self._validate().items():
                log.info("%s %.4f", name, value)
            return 0
        if first >= total:
            log.info("nothing left to train: %d of %d windows are done (%s)", first, total, self.job_dir)
            return 0
        is_complete = True
        raise_file_limit()
        with self.stop:
            self._start()
            batches = self._batches(first)
            self.pace = Pace()
            try:
                while is_complete and self.progress.window < total:
                    end = (self.progress.window // self.plan.windows_per_epoch + 1) * self.plan.windows_per_epoch
                    numbers = range(self.progress.window, end)
                    is_complete = self.task.train_epoch(self.training, batches, numbers, self._after_window)
            finally:
                batches.close()  # ends the loader's workers
                if self.dist.is_main:
                    for tracker in self.trackers:
                        tracker.close()
        if self.progress.window >= total:
            log.info("done: %d windows; %s", total, self.job_dir / "checkpoints" / "last")
            return 0
        log.warning(
            "stopped after window %d of %d; continue with --resume %s", self.progress.window, total, self.job_dir
        )
        return 128 + (self.stop.number or 15)

    def _start(self) -> None:
        """Files of the job folder and the trackers (rank 0)."""
        if not self.dist.is_main:
            return
        (self.job_dir / "config.yaml").write_text(dump_config(self.cfg), encoding="utf-8")
        job.write_json(self.job_dir / "manifest.json", self.manifest)
        info = RunInfo(
            self.job_dir, f"{self.job_dir.parent.name}/{self.job_dir.name}", asdict(self.cfg),
            self.plan.total_windows, self.progress.window, self.plan.max_epoch,
        )  # fmt: skip
        for tracker in self.trackers:
            tracker.start(info)

    def _batches(self, first: int) -> Generator[list[Batch], None, None]:
        """Windows from ``first`` to the end of the run; one iterator, so workers read ahead over epochs too."""
        loader = DataLoader(
            self.windows,
            batch_size=None,
            sampler=range(first, self.plan.total_windows),
            num_workers=self.cfg.run.num_workers,
            pin_memory=self.dist.device.type == "cuda",
            worker_init_fn=job.outlive_signals,
        )
        try:
            yield from loader
        except MiniGPT4Error as error:
            # a loader worker hands its traceback over as text; the message stands at its end
            kind = type(error)
            message = str(error).rsplit(f"{kind.__name__}: ", 1)[-1].strip()
            raise kind(message) from error.with_traceback(None)  # its frames would keep the workers alive

    def _after_window(self, number: int, stats: StepStats) -> bool:
        """Counts, logs and saves; returns whether to go on."""
        done = number + 1
        self.progress.window = done
        if stats.is_skipped:
            self.progress.skipped += 1
            log.warning("window %d has no target tokens: skipped (%d so far)", done, self.progress.skipped)
        else:
            self.progress.loss = stats.loss
            self.pace.add(stats.samples, stats.target_tokens, stats.loss, stats.waited_s)
        is_end = done == self.plan.total_windows
        if self.dist.is_main:
            self._log(number, stats, is_end)
        run = self.cfg.run
        every = self.plan.windows(run.save_every) if run.save_every else self.plan.windows_per_epoch
        if done % every == 0 or is_end or stats.should_stop:
            begun = time.perf_counter()
            self._save()
            self.pace.leave_out(time.perf_counter() - begun)
        return not stats.should_stop

    def _log(self, number: int, stats: StepStats, is_end: bool) -> None:
        done = number + 1
        for tracker in self.trackers:
            tracker.advance(done)
        every = max(1, self.cfg.run.log_freq // self.plan.accumulation)
        if stats.is_skipped or not (done % every == 0 or done == 1 or is_end or stats.should_stop):
            return
        record = WindowRecord(
            window=done,
            epoch=number // self.plan.windows_per_epoch,
            iteration=done * self.plan.accumulation,
            loss=stats.loss,
            lr=stats.lr,
            grad_norm=stats.grad_norm,
            samples=stats.samples,
            target_tokens=stats.target_tokens,
            memory_gb=memory_gb(self.dist.device),
            skipped=self.progress.skipped,
            **self.pace.take(self.plan.total_windows - done),
        )
        for tracker in self.trackers:
            tracker.log(record)

    def _save(self) -> None:
        """Validate, then write a checkpoint on rank 0; every rank waits for it."""
        if self._last_saved == self.progress.window:
            return
        metrics = self._validate()
        value = metrics.get("val_loss", math.nan)
        is_best = math.isfinite(value) and (self.progress.best is None or value < self.progress.best)
        if is_best:
            self.progress.best = value
        if self.dist.is_main:
            for tracker in self.trackers if metrics else ():
                tracker.metrics(self.progress.window, metrics)
            if math.isfinite(self.progress.loss):
                metrics["loss"] = self.progress.loss
            state = {
                **asdict(self.progress),
                "loss": metrics.get("loss"),
                "iteration": self.progress.window * self.plan.accumulation,
                "scaler": self.training.scaler.state_dict(),
                "order": self._order(),
            }
            path = save_checkpoint(
                self.job_dir / "checkpoints",
                self.progress.window,
                weights=self.model.trainable_state(),
                config_text=dump_config(self.cfg),
                manifest={**self.manifest, "metrics": metrics, "iteration": state["iteration"]},
                resume={"optimizer": optimizer_state(self.training.optimizer), "state": state},
                keep_last=self.cfg.run.keep_last,
                is_best=is_best,
            )
            draw_curve(self.job_dir)
            log.info("saved %s%s", path, " (best)" if is_best else "")
        self._last_saved = self.progress.window
        self.dist.barrier()

    def _validate(self) -> dict[str, float]:
        """Mean token loss per data set with a ``val`` split and over all of them; {} without such sets."""
        values = {}
        for dataset in self.val_datasets:
            mine = ValidationBatches(dataset, self.model.encoder, self.cfg.run.seed, self.dist)
            loader = DataLoader(
                mine, batch_size=None, num_workers=self.cfg.run.num_workers, worker_init_fn=job.outlive_signals
            )
            values[f"val_loss/{dataset.name}"] = self.task.validate(self.training, loader)
        if values:
            values["val_loss"] = sum(values.values()) / len(values)
        return values

    def _resume(self, checkpoint: Checkpoint) -> Progress:
        """Weights, moments, scaler and counters of ``checkpoint``; names the settings that changed since."""
        optimizer, state = checkpoint.load_resume()
        self.model.load_weights(checkpoint.load_weights(), str(checkpoint.path), complete=True)
        load_optimizer_state(self.training.optimizer, optimizer, str(checkpoint.path))
        if self.training.scaler.is_enabled() and state["scaler"]:
            self.training.scaler.load_state_dict(state["scaler"])
        for line in job.name_differences(state["order"], self._order()):
            log.warning("resume: %s", line)
        if state["window"] > self.plan.total_windows:
            raise CheckpointError(
                f"{checkpoint.path}: {state['window']} windows are done, the configuration asks for "
                f"{self.plan.total_windows} (run.max_epoch, run.iters_per_epoch)"
            )
        log.info("resuming at window %d of %d from %s", state["window"], self.plan.total_windows, checkpoint.path)
        loss = math.nan if state["loss"] is None else float(state["loss"])
        return Progress(state["window"], state["skipped"], state["best"], loss)

    def _order(self) -> dict[str, object]:
        """The settings that decide which samples a window holds and what its gradient is."""
        run, sets = self.cfg.run, self.cfg.datasets
        return {
            "run.seed": run.seed,
            "run.accum_grad_iters": run.accum_grad_iters,
            "world size": self.dist.world_size,
            "windows per epoch": self.plan.windows_per_epoch,
            "run.max_epoch": run.max_epoch,
            "sample_ratio": {name: cfg.sample_ratio for name, cfg in sets.items()},
            "batch_size": {name: cfg.batch_size for name, cfg in sets.items()},
            "data": {dataset.name: dataset.fingerprint() for dataset in self.datasets},
        }

    def _data_facts(self) -> dict[str, dict[str, object]]:
        return {
            dataset.name: {
                "samples": len(dataset),
                "sample_ratio": dataset.cfg.sample_ratio,
                "batch_size": dataset.cfg.batch_size,
                "fingerprint": dataset.fingerprint(),
            }
            for dataset in self.datasets
        }
