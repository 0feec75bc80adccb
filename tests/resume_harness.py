"""Real training processes that start fast and can be killed for real.

A fork server imports torch, transformers and the rest once, and every rank is forked from it. So a run of the real
classes (``train.py``'s own code, a tiny MiniGPT-v2, annotation files and pictures on disk) takes a second or two, and
SIGKILL hits a whole process. What happened is read from the job folder alone, as a user would read it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from PIL import Image

from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.logger import read_log
from tests import resume_children as children
from tests.golden_cases import LLAMA, TINY_EVA

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = 8
SAVE_WINDOWS = 2
_JOB = "proof"
_TIMEOUT_S = 120
_POLL_S = 0.001
_PRELOAD = (
    *("tests.resume_harness", "peft", "sentencepiece", "timm.models.eva"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
)
_SAME = ("window", "epoch", "iteration", "loss", "lr", "grad_norm", "samples", "target_tokens", "skipped")
"""What a log line must repeat to the last bit; the rest are times."""


@dataclass(frozen=True)
class Setup:
    """How a run is spread; ``options`` are further ``key=value`` settings."""

    ranks: int = 1
    workers: int = 0
    packing: str = "padded"
    options: tuple[str, ...] = ()
    per_node: int = 0  # ranks that say they share a node; 0 = nothing is said

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.workers} workers, {self.packing}"


@dataclass(frozen=True)
class Kill:
    """Where a kill fell: the last window in the log, and whether a checkpoint was being written."""

    window: int
    is_running: bool
    is_in_save: bool


@dataclass
class Attempt:
    """One start of a run on all its ranks."""

    folder: Path
    ranks: list[Any]
    outputs: list[Path]
    state_before: tuple[str, int]

    def kill(self) -> None:
        """SIGKILL to every rank; loader workers are left to themselves."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join(_TIMEOUT_S)

    def failed(self, rank: int = 0) -> str:
        """Waits for ``rank``, which must end by itself with an error for users; kills the others. What was printed."""
        self.ranks[rank].join(_TIMEOUT_S)
        code = self.ranks[rank].exitcode
        self.kill()
        assert code == 2, f"exit code {code}\n{self.text()}"
        assert "Traceback" not in self.outputs[rank].read_text(encoding="utf-8"), self.text()
        return self.text()

    def finish(self) -> list[int]:
        """Exit codes of the ranks."""
        end = time.monotonic() + _TIMEOUT_S
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        if any(rank.exitcode is None for rank in self.ranks):
            self.kill()
            raise AssertionError(f"still running after {_TIMEOUT_S} s\n{self.text()}")
        return [rank.exitcode for rank in self.ranks]

    def done(self) -> None:
        """Waits for the end, which must be a good one."""
        codes = self.finish()
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.text()}"

    def text(self) -> str:
        """What the ranks printed."""
        return "\n".join(path.read_text(encoding="utf-8") for path in self.outputs if path.is_file())

    def kill_after(self, window: int | None, delay: float) -> Kill:
        """Kills ``delay`` seconds after this attempt's log shows ``window`` (0: its first line; None: at any rate)."""
        if window is not None:
            self._wait_for(lambda: _state(self.folder) != self.state_before and last_window(self.folder) >= window)
        time.sleep(delay)
        is_running = all(rank.exitcode is None for rank in self.ranks)
        self.kill()
        drafts = list(newest(self.folder).glob("checkpoints/.*")) if jobs(self.folder) else []
        return Kill(last_window(self.folder), is_running, bool(drafts))

    def kill_rank_after(self, window: int, rank: int, number: int) -> None:
        """Sends a signal to one rank when the log shows ``window``."""
        self._wait_for(lambda: last_window(self.folder) >= window)
        os.kill(self.ranks[rank].pid, number)

    def crashed(self) -> None:
        """Waits for a rank that kills itself, then kills the others, as torchrun does."""
        self._wait_for(lambda: False)
        codes = {rank.exitcode for rank in self.ranks}
        self.kill()
        assert -signal.SIGKILL in codes, f"exit codes {codes}\n{self.text()}"

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Returns when ``condition`` holds or a rank has ended."""
        end = time.monotonic() + _TIMEOUT_S
        while all(rank.exitcode is None for rank in self.ranks) and not condition():
            assert time.monotonic() < end, f"nothing happened for {_TIMEOUT_S} s\n{self.text()}"
            time.sleep(_POLL_S)


@dataclass
class Lab:
    """Data on disk, a YAML file, and the fork server that starts ranks of it."""

    home: Path
    preload: tuple[str, ...] = ()
    server: Any = field(init=False)
    groups: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload([*_PRELOAD, *self.preload])
        (self.home / "proof.yaml").write_text(yaml.safe_dump(_config(self.home), sort_keys=False), encoding="utf-8")

    def start(self, folder: Path, setup: Setup, *options: str, crash: str = "", resume: str | None = "auto") -> Attempt:
        """Starts ``train.py`` on every rank with jobs below ``folder``. ``crash``: ``<place>:<window>``, or a fault."""
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("out_*_0.txt")))
        outputs = [folder / f"out_{number}_{rank}.txt" for rank in range(setup.ranks)]
        for path in outputs:
            path.touch(exist_ok=False)
        settings = [
            f"run.output_dir={folder}", f"run.num_workers={setup.workers}", f"run.packing={setup.packing}",
            f"run.dist_url=file://{folder}/meeting_{number}", *setup.options, *options,
        ]  # fmt: skip
        command = ["--cfg-path", str(self.home / "proof.yaml"), "--options", *settings]
        command += [] if resume is None else ["--resume", resume]
        state = _state(folder)
        ranks = [
            self.process(children.rank, rank, setup.ranks, command, crash, str(outputs[rank]), setup.per_node)
            for rank in range(setup.ranks)
        ]
        return Attempt(folder, ranks, outputs, state)

    def process(self, function: Callable[..., None], *arguments: Any) -> Any:
        """A started process of the fork server, leader of a process group of its own."""
        process = self.server.Process(target=children.lead, args=(function, *arguments))
        process.start()
        self.groups.append(process.pid)
        return process

    def orphans(self) -> list[str]:
        """Living processes of every group started so far."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = status.read_text().rsplit(")", 1)[1].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) in self.groups and state not in "ZX":  # a zombie waits for init to notice it
                found.append(status.parent.name)
        return found


@contextmanager
def open_lab(home: Path, preload: tuple[str, ...] = ()) -> Iterator[Lab]:
    """A Lab whose fork server runs this checkout's code, whatever pytest was started from, and ends with it.

    preload: further modules that its ranks need at once.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # one that others started knows no preload
        lab = Lab(home, preload)
        lab.process(time.sleep, 0).join()  # returns when the server has imported everything
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    try:
        yield lab
    finally:
        for group in lab.groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        lab.server.set_forkserver_preload(["__main__"])  # Python's default
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def rows(job: Path) -> list[dict[str, Any]]:
    """The window records of a job's log, in the order of the file, without times."""
    return [{key: row[key] for key in _SAME} for row in read_log(job / "log.txt") if "loss" in row]


def checks(job: Path) -> list[dict[str, Any]]:
    """Its validations."""
    return [row for row in read_log(job / "log.txt") if row.get("event") == "validation"]


def newest(folder: Path) -> Path:
    """The newest job below ``folder``."""
    return jobs(folder)[-1]


def last_window(folder: Path) -> int:
    """The last window in the newest job's log, 0 without one."""
    found = jobs(folder)
    if not found or not (found[-1] / "log.txt").is_file():
        return 0
    return max((row["window"] for row in rows(found[-1])), default=0)


def assert_same_run(job: Path, expected: Path) -> None:
    """Every line, validation, weight and moment equals ``expected``'s to the last bit."""
    assert rows(job) == rows(expected)
    assert checks(job) == checks(expected)
    left, right = read_checkpoint(job), read_checkpoint(expected)
    assert left.step == right.step
    assert_equal(left.load_weights(), right.load_weights())
    (moments, state), (expected_moments, expected_state) = left.load_resume(), right.load_resume()
    for name, values in expected_moments.items():
        assert_equal(moments[name], values)
    assert state == expected_state


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names with the same bits."""
    assert left.keys() == right.keys()
    different = [name for name, value in right.items() if not torch.equal(left[name], value)]
    assert not different, f"{len(different)} of {len(right)} tensors differ, first: {different[0]}"


def assert_whole(folder: Path) -> None:
    """After a kill: every file under a final name is complete."""
    for job in jobs(folder):
        for path in job.glob("checkpoints/step_*"):
            checkpoint = read_checkpoint(path)
            checkpoint.load_weights()
            checkpoint.load_resume()
        for name in ("config.yaml", "manifest.json"):
            if (job / name).is_file():
                assert yaml.safe_load((job / name).read_text(encoding="utf-8")), job / name
        if (job / "log.txt").is_file():
            *lines, _ = (job / "log.txt").read_text(encoding="utf-8").split("\n")  # the last may be cut short
            for line in lines:
                json.loads(line)


def jobs(folder: Path) -> list[Path]:
    """Job folders, the oldest first."""
    found = (folder / _JOB).iterdir() if (folder / _JOB).is_dir() else ()
    return sorted(found, key=lambda path: [int(part) for part in path.name.split("_")])


def _state(folder: Path) -> tuple[str, int]:
    """The newest job that has a log, and how often it was resumed: tells a new attempt's log from the old one's."""
    found = [job for job in jobs(folder) if (job / "log.txt").is_file()]
    if not found:
        return "", 0
    return found[-1].name, sum(row.get("event") == "resumed" for row in read_log(found[-1] / "log.txt"))


def _config(home: Path) -> dict[str, Any]:
    """Faces with pictures and a talk without, drawn 2 : 1; 2 epochs of 4 windows of 2 micro-batches."""
    faces, talk = _write_data(home)
    return {
        "model": {
            "arch": "minigpt_v2", "image_size": 56, "vit_model": "eva", "vit_weights": "random", "vit_config": TINY_EVA,
            "llama_model": str(LLAMA), "lora_r": 4, "lora_dropout": 0.1, "chat_template": True, "end_sym": "</s>",
        },
        "datasets": {
            "faces": {
                "format": "vqa", "build_info": {"ann_path": str(faces), "image_path": str(home)},
                "fields": {"image": "file", "question": "q", "answer": "label"}, "val": {"fraction": 0.2},
                "batch_size": 2, "sample_ratio": 2, "on_error": "skip", "max_bad_fraction": 0.5,
            },
            "talk": {"format": "text", "build_info": {"ann_path": str(talk)}, "batch_size": 3, "sample_ratio": 1},
        },
        "run": {
            "job_name": _JOB, "init_lr": 1e-2, "min_lr": 1e-3, "warmup_lr": 1e-4, "warmup_steps": 4, "max_epoch": 2,
            "iters_per_epoch": WINDOWS, "accum_grad_iters": 2, "save_every": 2 * SAVE_WINDOWS, "keep_last": 2,
            "row_tokens": 96, "log_freq": 1, "trackers": ["jsonl"], "device": "cpu",
            "valid": {"every": 8, "num_canaries": 0},
        },
    }  # fmt: skip


def _write_data(home: Path) -> tuple[Path, Path]:
    draw = Random(1)
    words = "the man woman has a sad happy nose hair smile big small old young face".split()

    def said(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    lines = ["file,q,label,kind"]
    for number in range(17):
        size = (draw.randint(30, 90), draw.randint(30, 90))
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(home / f"{number}.png")
        lines.append(f"{number}.png,what {said(4)}?,{said(9)},{min(number, 4)}")
    (home / "5.png").write_bytes((home / "5.png").read_bytes()[:100])  # on_error: skip takes the next one
    faces, talk = home / "faces.csv", home / "talk.json"
    faces.write_text("\n".join(lines) + "\n", encoding="utf-8")
    talk.write_text(json.dumps([{"question": said(5), "answer": said(9)} for _ in range(7)]), encoding="utf-8")
    return faces, talk
