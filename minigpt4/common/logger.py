"""What a run says: log lines, and trackers (terminal, log.txt, wandb, tensorboard) that rank 0 feeds.

log.txt holds one JSON object per line: first ``{"config": {...}}``, then one per logged window, and
``{"event": ...}`` lines for resumes and validations.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.common.files import write_atomically, writing

log = logging.getLogger(__name__)

console = Console()
LOG_FILE = "log.txt"


@dataclass(frozen=True)
class WindowRecord:
    """One logged window. Rates and ``loss_avg`` cover the windows since the record before."""

    window: int  # optimiser steps done
    epoch: int
    iteration: int  # micro-batches per rank done
    loss: float  # mean over the target tokens of this window, all ranks
    loss_avg: float
    lr: float
    grad_norm: float
    samples: int  # of this window, all ranks
    target_tokens: int
    samples_per_s: float
    target_tokens_per_s: float
    data_share: float  # part of the time spent waiting for data
    wait_s: float  # mean seconds of a window on this rank: waiting for data,
    vision_s: float  # images to embeddings,
    language_s: float  # language model and loss, forward,
    backward_s: float  # backward, recomputed layers among it,
    optimizer_s: float  # clipping and the update
    vision_gb: float  # peak of live tensors on the GPU in each phase; 0 on a CPU
    language_gb: float
    backward_gb: float
    optimizer_gb: float
    memory_gb: float  # peak of live tensors on the GPU; peak resident memory on a CPU
    elapsed_s: float
    eta_s: float
    skipped: int  # windows without target tokens so far


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told at the start. ``owes_validation``: that of ``start_window`` is still to come."""

    job_dir: Path
    name: str
    config: Mapping[str, Any]
    total_windows: int
    start_window: int
    max_epoch: int
    owes_validation: bool = False

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether a line of an earlier attempt's log is of before the checkpoint that this one goes on from."""
        window = row.get("window", 0)
        is_repeated = self.owes_validation and row.get("event") in ("validation", "canaries")
        return bool(window < self.start_window or (window == self.start_window and not is_repeated))


class Tracker(Protocol):
    """Receives the numbers of a run on rank 0."""

    def start(self, info: RunInfo) -> None:
        """Before the first window."""

    def advance(self, window: int) -> None:
        """After every window; must cost nothing."""

    def log(self, record: WindowRecord) -> None:
        """At every log point."""

    def metrics(self, window: int, values: Mapping[str, float]) -> None:
        """After a validation."""

    def answers(self, window: int, rows: Sequence[Mapping[str, str]]) -> None:
        """After a validation with canaries: source, question, reference and answer of each."""

    def busy(self, text: str) -> None:
        """While something else than training is going on."""

    def close(self) -> None:
        """After the last window, also when the run was stopped."""


def setup_logging(is_main: bool) -> None:
    """Log lines of rank 0 from INFO on, of other ranks from WARNING on; beside the progress bar on a terminal."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    if console.is_terminal:
        root.addHandler(RichHandler(console=console, show_path=False, show_level=False, markup=False))
    else:
        plain = logging.StreamHandler(sys.stdout)
        plain.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(plain)
    root.setLevel(logging.WARNING)
    logging.getLogger("minigpt4").setLevel(logging.INFO if is_main else logging.WARNING)


class TerminalTracker:
    """A progress bar on a terminal, one line per log point elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._info: RunInfo | None = None

    def start(self, info: RunInfo) -> None:
        """Shows the bar."""
        self._info = info
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console)
            self._bar.add_task("starting", total=info.total_windows, completed=info.start_window, numbers="")
            self._bar.start()

    def advance(self, window: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=window)

    def log(self, record: WindowRecord) -> None:
        """Shows loss, learning rate, rates, memory and time left."""
        assert self._info is not None
        place = f"epoch {record.epoch + 1}/{self._info.max_epoch} window {record.window}/{self._info.total_windows}"
        numbers = (
            f"loss {record.loss_avg:.4f}  lr {record.lr:.3e}  {record.samples_per_s:.2f} samples/s  "
            f"{record.target_tokens_per_s:.0f} target tokens/s  {record.memory_gb:.1f} GB  eta {_clock(record.eta_s)}"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=place, numbers=numbers)
        else:
            log.info("%s  %s", place, numbers)

    def metrics(self, window: int, values: Mapping[str, float]) -> None:
        """One line."""
        log.info("window %d  %s", window, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def answers(self, window: int, rows: Sequence[Mapping[str, str]]) -> None:
        """One line per canary."""
        for row in rows:
            reference = f"  (reference: {_short(row['reference'])})" if row["reference"] else ""
            log.info("canary %s: %s -> %s%s", row["source"], _short(row["question"]), _short(row["answer"]), reference)

    def busy(self, text: str) -> None:
        """Says on the bar what is going on."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class JsonlTracker:
    """``log.txt`` of the job folder; a resumed run drops the records after the window it starts from."""

    def __init__(self) -> None:
        self._path = Path()

    def start(self, info: RunInfo) -> None:
        """Writes the configuration, or cuts a log that is there back to the window of the checkpoint."""
        self._path = info.job_dir / LOG_FILE
        if not self._path.is_file():
            self._append({"config": info.config})
            return
        kept = [row for row in read_log(self._path) if info.keeps(row)]
        kept.append({"event": "resumed", "window": info.start_window, "config": info.config})
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def advance(self, window: int) -> None:
        """Nothing between log points."""

    def log(self, record: WindowRecord) -> None:
        """One line."""
        self._append(asdict(record))

    def metrics(self, window: int, values: Mapping[str, float]) -> None:
        """One line with ``event: validation``."""
        self._append({"event": "validation", "window": window, **values})

    def answers(self, window: int, rows: Sequence[Mapping[str, str]]) -> None:
        """One line with ``event: canaries``."""
        self._append({"event": "canaries", "window": window, "answers": [dict(row) for row in rows]})

    def busy(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Every line is on disk already."""

    def _append(self, row: Mapping[str, Any]) -> None:
        # strict JSON knows no NaN or Infinity (a gradient norm that overflowed in fp16)
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


class WandbTracker:
    """Weights & Biases; project from WANDB_PROJECT, else ``minigptv``. Works offline (WANDB_MODE=offline)."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, info: RunInfo) -> None:
        """Opens the run of this job folder, the same one after a resume."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minigptv"),
            name=info.name,
            id=f"{info.job_dir.parent.name}-{info.job_dir.name}",
            resume="allow",
            dir=str(info.job_dir),
            config=dict(info.config),
        )

    def advance(self, window: int) -> None:
        """Nothing between log points."""

    def log(self, record: WindowRecord) -> None:
        """All numbers of the record."""
        self._run.log(asdict(record), step=record.window)

    def metrics(self, window: int, values: Mapping[str, float]) -> None:
        """Validation numbers at their window."""
        self._run.log(dict(values), step=window)

    def answers(self, window: int, rows: Sequence[Mapping[str, str]]) -> None:
        """A table of the window's answers."""
        import wandb

        columns: list[str | int] = ["source", "question", "reference", "answer"]
        table = wandb.Table(columns=columns, data=[[row[str(name)] for name in columns] for row in rows])
        self._run.log({"canaries": table}, step=window)

    def busy(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


class TensorboardTracker:
    """Event files under ``<job>/tensorboard``."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        """Opens the event file; points after the start window of a resumed run are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        purge = info.start_window + 1 if info.start_window else None
        self._writer = SummaryWriter(str(info.job_dir / "tensorboard"), purge_step=purge)

    def advance(self, window: int) -> None:
        """Nothing between log points."""

    def log(self, record: WindowRecord) -> None:
        """One scalar per number."""
        for name, value in asdict(record).items():
            if name != "window":
                self._writer.add_scalar(f"train/{name}", value, record.window)

    def metrics(self, window: int, values: Mapping[str, float]) -> None:
        """One scalar per number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, window)

    def answers(self, window: int, rows: Sequence[Mapping[str, str]]) -> None:
        """One text per canary."""
        for row in rows:
            text = f"{row['question']}\n\n**{row['answer']}**\n\n(reference: {row['reference']})"
            self._writer.add_text(f"canaries/{row['source']}", text, window)

    def busy(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


_TRACKERS: Mapping[str, tuple[Callable[[], Tracker], str]] = {
    "terminal": (TerminalTracker, ""),
    "jsonl": (JsonlTracker, ""),
    "wandb": (WandbTracker, "wandb"),
    "tensorboard": (TensorboardTracker, "tensorboard"),
}


def build_trackers(names: Sequence[str]) -> list[Tracker]:
    """Trackers by name, not started. Raises ConfigError for an unknown one or a package that is not installed."""
    trackers: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name not in _TRACKERS:
            known = ", ".join(_TRACKERS)
            raise ConfigError(f"run.trackers: unknown '{name}'{nearest(name, _TRACKERS)}; known: {known}")
        make, package = _TRACKERS[name]
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.trackers: '{name}' needs a package that is not installed; run: pip install {package}"
            )
        trackers.append(make())
    return trackers


class Pace:
    """Rates between two log points."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self._since = self.started
        self._samples = 0
        self._tokens = 0
        self._loss_sum = 0.0
        self._windows = 0
        self._seconds = 0.0
        self._all_windows = 0

    def add(self, samples: int, tokens: int, loss: float, waited: float) -> None:
        """One window: counts over all ranks, its mean loss, the seconds this rank waited for data."""
        self._samples += samples
        self._tokens += tokens
        self._loss_sum += loss * tokens
        self._windows += 1
        self.waited += waited

    @property
    def windows(self) -> int:
        """Windows since the last call of ``take``."""
        return self._windows

    def leave_out(self, seconds: float) -> None:
        """Time that was no training (a checkpoint, a validation)."""
        self._since += seconds

    def take(self, windows_left: int) -> dict[str, float]:
        """The rate fields of a WindowRecord since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self._seconds += seconds
        self._all_windows += self._windows
        rates = {
            "loss_avg": self._loss_sum / max(self._tokens, 1),
            "samples_per_s": self._samples / seconds,
            "target_tokens_per_s": self._tokens / seconds,
            "data_share": min(self.waited / seconds, 1.0),
            "wait_s": self.waited / max(self._windows, 1),
            "elapsed_s": now - self.started,
            "eta_s": self._seconds / max(self._all_windows, 1) * windows_left,
        }
        self._since, self.waited, self._loss_sum = now, 0.0, 0.0
        self._samples = self._tokens = self._windows = 0
        return rates


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a log.txt; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            log.warning("%s: left out an incomplete line", path)
    return rows


def _short(text: str, limit: int = 160) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= limit else f"{shown[: limit - 6]} [...]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
