"""The folder of a run: its name, what is written into it at the start, and which checkpoint a resume means."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from minigpt4.common.checkpoint import (
    Checkpoint,
    find_newest,
    is_job_name,
    is_last,
    read_checkpoint,
)
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import CheckpointError, RunError
from minigpt4.common.files import write_atomically, writing
from minigpt4.common.schema import Config, DatasetConfig
from minigpt4.datasets.collate import SampleDataset

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "peft", "timm", "bitsandbytes", "safetensors", "tokenizers", "pillow", "numpy")
_GRACE_S = 1.0
_WORKER_GRACE_S = 30


class StopSignals:
    """SIGTERM and Ctrl-C finish the current window; a second one leaves at once.

    A repetition within a second counts as the same request: torchrun hands on a Ctrl-C that the terminal has
    already sent to every process.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self._first > _GRACE_S:
            os._exit(128 + number)
        if not self.number:
            self.number, self._first = number, time.monotonic()
            log.warning("%s: finishing this window, then saving (again = leave at once)", signal.Signals(number).name)


def outlive_signals(worker: int) -> None:
    """For loader workers: a signal to the whole group leaves them time to feed the window that is being finished.

    They do not ignore SIGTERM for ever: the interpreter ends leftover workers with it and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_GRACE_S))


def job_root(cfg: Config) -> Path:
    """Where the runs of one job name lie."""
    return Path(cfg.run.output_dir) / (cfg.run.job_name or cfg.model.arch)


def create_job_dir(cfg: Config, dist: DistContext) -> Path:
    """A new folder ``<output_dir>/<job>/<time>[_k]``, the same on every rank; two runs never share one."""
    path = None
    if dist.is_main:
        stamp = time.strftime("%Y%m%d_%H%M%S")
        root = job_root(cfg)
        with writing(root):
            path = _make_job_dir(root, stamp)
    return Path(dist.broadcast_object(path))


def _make_job_dir(root: Path, stamp: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path, count = root / stamp, 1
    while True:
        try:
            path.mkdir(exist_ok=False)
            return path
        except FileExistsError:
            count += 1
            path = root / f"{stamp}_{count}"


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Around training: RunError when the system ended a loader worker, which torch may report from any line."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise lost_worker(error) from error


def lost_worker(error: Exception) -> RunError:
    """What ``error`` of a loader means for people: one of its processes is gone. Ends the loader's other processes."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None  # torch's raises the error once more
    error.with_traceback(None)  # its frames kept the loader alive
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
    text = str(error).strip()
    found = text.splitlines()[0].rstrip(". ") if text.startswith("DataLoader worker") else f"in its place: {error!r}"
    return RunError(
        f"a process that loads data is gone ({found}). If nobody killed it, memory ran out, of the machine or of "
        "/dev/shm: use a smaller run.num_workers, 0 for none. Go on from the last checkpoint with --resume auto"
    )


def find_resume(cfg: Config, dist: DistContext) -> Checkpoint | None:
    """The checkpoint ``run.resume_ckpt_path`` means: a directory, or with 'auto' the last one of the newest job.

    Rank 0 reads every byte of it once; of a job it is the last checkpoint that is whole. 'auto' without any starts from
    the beginning. Raises CheckpointError, on every rank, for a path that is incomplete or damaged.
    """
    wanted = cfg.run.resume_ckpt_path
    if not wanted:
        return None
    path, problem = None, ""
    if dist.is_main:
        try:
            found = find_newest(job_root(cfg), True) if wanted == "auto" else read_checkpoint(wanted, True)
            path = None if found is None else found.path
        except CheckpointError as error:
            problem = str(error)
    path, problem = dist.broadcast_object((path, problem))
    if problem:
        raise CheckpointError(problem)
    if path is None:
        log.info("resume auto: no checkpoint under %s, starting from the beginning", job_root(cfg))
        return None
    return read_checkpoint(path)


def continues_job(checkpoint: Checkpoint) -> bool:
    """Whether a run goes on in the checkpoint's own folder: only from its last one, an earlier one is a branch."""
    job_dir = checkpoint.path.parent.parent
    if checkpoint.path.parent.name != "checkpoints" or not is_job_name(job_dir.name):
        return False
    return is_last(checkpoint)


def describe_start(cfg: Config, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Where a run starts, for the manifest and the log: anew, with weights of another run, or where one stopped."""
    if checkpoint is not None:
        return {"start": "resumed", "resumed_from": str(checkpoint.path), "resumed_at_window": checkpoint.step}
    if not cfg.model.ckpt:
        return {"start": "new"}
    log.info("new job at window 0 with the weights of model.ckpt %s; optimiser and counters are fresh", cfg.model.ckpt)
    return {"start": "new", "weights_from": cfg.model.ckpt}


def describe_data(datasets: Sequence[SampleDataset]) -> dict[str, dict[str, Any]]:
    """What the manifest says of each data set."""
    return {
        dataset.name: {
            "samples": len(dataset),
            "sample_ratio": dataset.cfg.sample_ratio,
            "batch_size": dataset.cfg.batch_size,
            "fingerprint": dataset.fingerprint(),
        }
        for dataset in datasets
    }


def describe_run(cfg: Config, dist: DistContext, data: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of a run: what it takes to know where a checkpoint came from."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": _git_state(),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": str(dist.device.type),
        "world_size": dist.world_size,
        "seed": cfg.run.seed,
        "arch": cfg.model.arch,
        "question_processor": question_processor(list(cfg.datasets.values())),
        "data": data,
    }


def earlier_starts(job_dir: Path) -> list[dict[str, Any]]:
    """How a job was started before, oldest first: command, time, commit and number of ranks of each start."""
    path = job_dir / "manifest.json"
    if not path.is_file():
        return []
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: before.get(key) for key in ("command", "started", "git", "world_size", "resumed_from", "weights_from")}
    return [*before.get("earlier_starts", []), kept]


def question_processor(datasets: list[DatasetConfig]) -> str:
    """Text processor of the training data set that is drawn most: chat applies the same one to questions."""
    if not datasets:
        return "identity"
    most = max(datasets, key=lambda cfg: 1.0 if cfg.sample_ratio is None else cfg.sample_ratio)
    cleans_questions = not {"questions", "fields"}.isdisjoint(most.process_text)
    return (most.text_processor.train.name if cleans_questions else "") or "identity"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable JSON, written whole or not at all."""
    write_atomically(path, json.dumps(content, indent=1))


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> str:
    """Commit of the code, with '+' when files differ from it; '' outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changes else "")
