"""Owns time: builds every part of a run once, in order, then trains, validates, saves and resumes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict
from typing import ClassVar

import torch
from torch.utils.data import DataLoader

from minigpt4.common import schema
from minigpt4.common.checkpoint import Checkpoint, settle_links
from minigpt4.common.config import dump_config
from minigpt4.common.curve import draw_curve
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import CheckpointError, DataError, MiniGPT4Error
from minigpt4.common.files import write_atomically
from minigpt4.common.logger import Pace, RunInfo, WindowRecord, build_trackers
from minigpt4.common.optim import build_optimizer, find_schedule, schedule_plan
from minigpt4.common.registry import registry
from minigpt4.common.sharding import is_sharded_run, make_mesh
from minigpt4.common.types import Batch
from minigpt4.datasets.collate import WindowDataset, collate_padded
from minigpt4.models.split_model import place_around_llm, split
from minigpt4.runners import changes, job, overview, sanity
from minigpt4.runners.ahead import copied_ahead
from minigpt4.runners.kept_answers import keep_answers
from minigpt4.runners.parts import (
    build_datasets,
    build_model,
    build_sampler,
    can_defer,
    choose_packing,
    choose_precision,
    describe_rows,
    make_plan,
    memory_gb,
    raise_file_limit,
    settle_layers,
    watch_phases,
)
from minigpt4.runners.picture_cache import use_picture_cache
from minigpt4.runners.progress import Progress
from minigpt4.runners.saving import Saver, load_resume
from minigpt4.runners.validation import Scores, Validator, is_lower_better
from minigpt4.runners.vision_cache import known_vision, use_cache
from minigpt4.tasks.base_task import BaseTask, Training
from minigpt4.tasks.figures import StepStats
from minigpt4.tasks.memory import memory_full

log = logging.getLogger(__name__)


@registry.register("runner", "runner_base")
class RunnerBase:
    """The training loop: epochs, validation, checkpoints, resume; one process per GPU."""

    Config: ClassVar[type[schema.RunConfig]] = schema.RunConfig

    def __init__(self, cfg: schema.Config, dist: DistContext) -> None:
        """Builds everything. Raises ConfigError, DataError or CheckpointError before the first window."""
        run = cfg.run
        self.cfg, self.dist, self.config_text = cfg, dist, dump_config(cfg)
        self.stop = job.StopSignals()
        schedule = find_schedule(run)
        self.trackers = build_trackers(run.trackers)
        self.task: BaseTask = registry.get("task", run.task)()
        checkpoint = job.find_resume(cfg, dist)
        if checkpoint is not None:
            changes.check_lora(checkpoint, self.config_text)
        precision = choose_precision(run.precision, dist.device)

        torch.manual_seed(run.seed)
        is_sharded = is_sharded_run(run, dist)
        mesh = make_mesh(dist, run.shard_over) if is_sharded else None
        place = torch.device("cpu") if is_sharded else dist.device
        self.model = build_model(cfg, place, precision, known_vision(cfg, dist))
        if checkpoint is not None:  # first: it may hold frozen parts whose features are cached
            self.model.load_weights(checkpoint.load_weights(), str(checkpoint.path), complete=True)
        if is_sharded:
            place_around_llm(self.model, dist.device)
        wrapped = self.model if is_sharded else dist.wrap(self.model)

        packing = choose_packing(run.packing, self.model)
        rows = describe_rows(run, packing, self.model)
        self.datasets = build_datasets(cfg, self.model, "train")
        held_out = build_datasets(cfg, self.model, "val")
        self.sampler = build_sampler(cfg, self.datasets, dist)
        self.windows = WindowDataset(self.datasets, self.sampler, self.model.encoder, packing, run.row_tokens, run.seed)
        self.plan = make_plan(cfg, self.datasets, self.sampler, dist.world_size)
        shown = held_out if run.evaluate else [*self.datasets, *held_out]
        before = checkpoint.counters().get("fused_layers", "") if checkpoint is not None else ""
        self.layers = settle_layers(run, self.model, self.plan, dist, before)
        rows = f"{rows}; LLM layers {self.layers.why}"
        passes = self.plan.passes(self.datasets, self.sampler, dist.world_size)
        features = use_cache(cfg, self.model, shown, dist, passes)
        use_picture_cache(cfg, shown)
        if mesh is not None:  # last: what was cached above belongs to nobody any more
            split(self.model, mesh)
        self.validator = Validator(cfg, self.model, self.task, held_out, dist, features)

        lr_plan = schedule_plan(run, self.plan.iters_per_epoch)
        optimizer = build_optimizer(self.model.trainable_parameters_by_name(), run, dist.device)
        scaler = torch.amp.GradScaler(dist.device.type, enabled=precision == torch.float16)
        is_same_job = checkpoint is not None and job.continues_job(checkpoint)
        self.job_dir = checkpoint.path.parent.parent if checkpoint and is_same_job else job.create_job_dir(cfg, dist)
        if checkpoint is not None and is_same_job and dist.is_main:
            settle_links(checkpoint)
        self.training = Training(
            model=wrapped, core=self.model, optimizer=optimizer, scaler=scaler,
            lr_at=lambda t: schedule(t, lr_plan), dist=dist, accumulation=run.accum_grad_iters,
            clip_grad_norm=run.clip_grad_norm, seed=run.seed, job_dir=self.job_dir, stop_requested=self.stop.requested,
            is_sharded=is_sharded, defer=can_defer(dist.device),
            clock=watch_phases(self.model, dist),
        )  # fmt: skip
        self.saver = Saver(self.training, self.model, self.config_text, run.keep_last)
        self.progress = Progress() if checkpoint is None else self._resume(checkpoint)
        self.manifest = job.describe_run(cfg, dist, job.describe_data(self.datasets))
        self.manifest["load_report"] = [report.as_dict() for report in self.model.load_reports]
        self.manifest.update(job.describe_start(cfg, checkpoint))
        self._last_saved = self.progress.window if is_same_job else -1
        self.pace = Pace()
        self._is_first_loss = checkpoint is None
        self._check_and_show(rows, str(precision).removeprefix("torch."))

    def _check_and_show(self, rows: str, precision: str) -> None:
        """The header of a run, and the checks that need no training. Every rank comes to the same verdict."""
        encoder = self.model.encoder
        surveys = overview.survey(self.datasets, encoder, self.cfg.run.seed)
        if self.dist.is_main:
            overview.show(surveys, self.sampler, self.plan, self.dist.world_size, self.model)
            sanity.warn_of_cuts(surveys)
            log.info("precision %s; %s; device %s; job %s", precision, rows, self.dist.device, self.job_dir)
        messages = [*sanity.check_labels(surveys, encoder), *sanity.check_image_size(self.cfg)]
        sanity.report(self.cfg.run.sanity, messages)

    def train(self) -> int:
        """The whole run from where it stands. Returns the exit code: 0, or 128 + signal after a stop."""
        first, total = self.progress.window, self.plan.total_windows
        if self.cfg.run.evaluate:
            return self._evaluate()
        if self.progress.is_over or (first >= total and not self.progress.owes_validation):
            why = "the run was stopped early" if self.progress.is_over else f"{first} of {total} windows are done"
            log.info("nothing left to train: %s (%s)", why, self.job_dir)
            return 0
        raise_file_limit()
        if self.dist.world_size > 2 and not self.training.is_sharded:
            self.task.rehearse(self.training, self._rehearsal())
        with self.stop, job.naming_lost_workers():
            self._start()
            batches = self._batches(first)
            try:
                self._make_up_validation()
                self.pace = Pace()
                is_complete = not self.progress.is_over
                while is_complete and self.progress.window < total:
                    end = (self.progress.window // self.plan.windows_per_epoch + 1) * self.plan.windows_per_epoch
                    numbers = range(self.progress.window, end)
                    is_complete = self.task.train_epoch(
                        self.training, batches, numbers, self._after_window, self._is_due
                    )
            except torch.OutOfMemoryError as error:
                place = "; ".join(getattr(error, "__notes__", ())) or f"window {self.progress.window + 1}"
                config, dist = self.job_dir / "config.yaml", self.dist
                raise memory_full(self.cfg, config, place, dist.device, error, dist.world_size) from None
            finally:
                batches.close()  # ends the loader's workers
                for tracker in self.trackers if self.dist.is_main else ():
                    tracker.close()
                self.saver.wait()
        if (self.progress.window >= total and not self.progress.owes_validation) or self.progress.is_over:
            log.info("done: %d windows; %s", self.progress.window, self.job_dir / "checkpoints" / "last")
            return 0
        log.warning(
            "stopped after window %d of %d; continue with --resume %s", self.progress.window, total, self.job_dir
        )
        return 128 + (self.stop.number or 15)

    def _evaluate(self) -> int:
        """``run.evaluate``: one validation, nothing trained, nothing written."""
        if not self.validator.is_needed:
            raise DataError("run.evaluate: no data set holds anything out; write val: {fraction: 0.1} in one of them")
        scores = self.validator.run(self.training)
        if self.dist.is_main:
            for name, value in scores.values.items():
                log.info("%s %.4f", name, value)
            for row in scores.canaries:
                log.info("canary %s: %s -> %s", row.source, row.question, row.answer)
        return 0

    def _start(self) -> None:
        """Files of the job folder and the trackers (rank 0)."""
        if not self.dist.is_main:
            return
        write_atomically(self.job_dir / "config.yaml", self.config_text)
        self.manifest["earlier_starts"] = job.earlier_starts(self.job_dir)
        job.write_json(self.job_dir / "manifest.json", self.manifest)
        info = RunInfo(
            self.job_dir, f"{self.job_dir.parent.name}/{self.job_dir.name}", asdict(self.cfg),
            self.plan.total_windows, self.progress.window, self.plan.max_epoch, self.progress.owes_validation,
        )  # fmt: skip
        for tracker in self.trackers:
            tracker.start(info)

    def _rehearsal(self) -> Batch:
        """The same batch at every start: the first record of the first data set that has pictures, if one has."""
        samples = [dataset.sample(0, 0, self.cfg.run.seed) for dataset in self.datasets]
        chosen = next((sample for sample in samples if sample.images), samples[0])
        return collate_padded([chosen], self.model.encoder)

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
            yield from copied_ahead(iter(loader), self.dist.device)
        except MiniGPT4Error as error:
            # a loader worker hands its traceback over as text; the message stands at its end
            kind = type(error)
            message = str(error).rsplit(f"{kind.__name__}: ", 1)[-1].strip()
            raise kind(message) from error.with_traceback(None)  # its frames would keep the workers alive
        except (ConnectionError, EOFError) as error:  # a worker that was killed while it handed over a batch
            raise job.lost_worker(error) from error

    def _after_window(self, number: int, stats: StepStats) -> bool:
        """Counts, logs and saves; returns whether to go on."""
        done = number + 1
        self.progress.window = done
        self.progress.add_bad(stats.passed_over)
        if stats.is_skipped:
            self.progress.skipped += 1
            log.warning("window %d has no target tokens: skipped (%d so far)", done, self.progress.skipped)
        else:
            self.progress.loss = stats.loss
            self.pace.add(stats.samples, stats.target_tokens, stats.loss, stats.waited_s)
            if self._is_first_loss and self.cfg.model.llama_weights != "random":
                vocab_size = self.model.encoder.tokenizer.vocab_size
                sanity.report(self.cfg.run.sanity, sanity.check_first_loss(stats.loss, vocab_size))
            self._is_first_loss = False
        if self.dist.is_main:
            self._log(number, stats)
        begun = time.perf_counter()
        self._validate_and_save(done, stats.should_stop)
        self.pace.leave_out(time.perf_counter() - begun)
        return not (stats.should_stop or self.progress.is_over)

    def _is_due(self, number: int) -> bool:
        """Whether something besides counting is done after a window; the same on every rank."""
        done = number + 1
        return self._is_logged(done) or self._is_saved(done) or (self.validator.is_needed and self._is_validated(done))

    def _is_logged(self, done: int) -> bool:
        every = max(1, self.cfg.run.log_freq // self.plan.accumulation)
        return done % every == 0 or done in (1, self.plan.total_windows)

    def _is_saved(self, done: int) -> bool:
        return done % self.plan.windows_between(self.cfg.run.save_every) == 0 or done == self.plan.total_windows

    def _is_validated(self, done: int) -> bool:
        every = self.cfg.run.valid.every or self.cfg.run.save_every
        return done % self.plan.windows_between(every) == 0 or done == self.plan.total_windows

    def _validate_and_save(self, done: int, is_stopped: bool) -> None:
        """What is due after this window. A stop by signal saves at once, and leaves a due validation to who goes on."""
        is_save, is_check = self._is_saved(done), self.validator.is_needed and self._is_validated(done)
        self.progress.owes_validation = is_stopped and is_check
        if is_check and not is_stopped:
            self._validate_then_save(is_save)
        elif is_save or is_stopped:
            self._save({}, False)

    def _make_up_validation(self) -> None:
        """The validation that a stop by signal left out; its checkpoint is written anew, with what it came to."""
        if self.progress.owes_validation:
            self.progress.owes_validation, self._last_saved = False, -1
            self._validate_then_save(True)

    def _validate_then_save(self, is_save: bool) -> None:
        scores = self._validate()
        is_best = self._judge(scores)
        if self.dist.is_main:
            keep_answers(self.job_dir, self.progress.window, scores.answers, is_best)
        if is_save or is_best or self.progress.is_over:
            self._save(scores.values, is_best)

    def _log(self, number: int, stats: StepStats) -> None:
        done = number + 1
        for tracker in self.trackers:
            tracker.advance(done)
        if stats.is_skipped or not (self._is_logged(done) or stats.should_stop):
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
            memory_gb=memory_gb(self.training.clock),
            skipped=self.progress.skipped,
            **self.training.clock.take(self.pace.windows),
            **self.pace.take(self.plan.total_windows - done),
        )
        for tracker in self.trackers:
            tracker.log(record)

    def _validate(self) -> Scores:
        """One validation, told to the trackers."""
        scores = self.validator.run(self.training, self._tell)
        for tracker in self.trackers if self.dist.is_main else ():
            if scores.values:
                tracker.metrics(self.progress.window, scores.values)
            if scores.canaries:
                tracker.answers(self.progress.window, [asdict(row) for row in scores.canaries])
        return scores

    def _tell(self, text: str) -> None:
        for tracker in self.trackers if self.dist.is_main else ():
            tracker.busy(text)

    def _judge(self, scores: Scores) -> bool:
        """Whether this is the best model so far; ends the run after ``patience`` validations without a better one."""
        valid, progress = self.cfg.run.valid, self.progress
        if not scores.values:
            return False
        name = valid.decides
        is_best = progress.judge(name, scores.values[f"val_{name}"], is_lower_better(name))
        if valid.patience and progress.stale >= valid.patience:
            progress.is_over = True
            best = "none" if progress.best is None else f"{progress.best:.4f} after window {progress.best_window}"
            log.info("stopping early: no better %s in %d validations (best: %s)", name, progress.stale, best)
        return is_best

    def _save(self, metrics: Mapping[str, float], is_best: bool) -> None:
        """Writes a checkpoint; every rank takes part."""
        if self._last_saved == self.progress.window:
            return
        progress = self.progress
        progress.merge_bad(self.dist.gather_objects(progress.bad_records))
        self._check_budget()
        loss = {"loss": progress.loss} if math.isfinite(progress.loss) else {}
        self.manifest.update(metrics={**metrics, **loss}, bad_records=progress.bad_summary())
        iteration = progress.window * self.plan.accumulation
        scaler = self.training.scaler.state_dict()
        state = {
            **progress.to_state(), "iteration": iteration, "scaler": scaler, "order": self._order(),
            "fused_layers": self.layers.name,
        }  # fmt: skip
        self.saver.save(progress.window, state, {**self.manifest, "iteration": iteration}, is_best)
        if self.dist.is_main:
            job.write_json(self.job_dir / "manifest.json", {**self.manifest, "window": progress.window})
            draw_curve(self.job_dir)
        self._last_saved = progress.window

    def _check_budget(self) -> None:
        """Raises DataError when more records were passed over, on all ranks together, than a data set allows."""
        for dataset in self.datasets:
            count = len(self.progress.bad_records.get(dataset.name, {}))
            limit = dataset.cfg.max_bad_fraction * len(dataset)
            if count > limit:
                example = self.progress.bad_summary()[dataset.name]["examples"][0]
                raise DataError(
                    f"dataset '{dataset.name}': {count} of {len(dataset)} records could not be read, max_bad_fraction "
                    f"{dataset.cfg.max_bad_fraction} allows {int(limit)}; for example {example}"
                )

    def _resume(self, checkpoint: Checkpoint) -> Progress:
        """Moments, scaler and counters of ``checkpoint``; names the settings that changed since."""
        state = load_resume(checkpoint, self.training)
        differences = changes.name_differences(state["order"], self._order())
        for line in [*differences, *changes.name_model_changes(checkpoint, self.config_text)]:
            log.warning("resume: %s", line)
        if state["window"] > self.plan.total_windows:
            raise CheckpointError(
                f"{checkpoint.path}: {state['window']} windows are done, the configuration asks for "
                f"{self.plan.total_windows} (run.max_epoch, run.iters_per_epoch)"
            )
        log.info("resuming at window %d of %d from %s", state["window"], self.plan.total_windows, checkpoint.path)
        progress = Progress.from_state(state)
        progress.owes_validation = progress.owes_validation and self.validator.is_needed
        return progress

    def _order(self) -> dict[str, object]:
        fingerprints = {dataset.name: dataset.fingerprint() for dataset in self.datasets}
        return changes.sample_settings(self.cfg, self.dist.world_size, self.plan.windows_per_epoch, fingerprints)
