"""Checkpoint directories: written whole or not at all, complete or refused.

::

    <job>/checkpoints/step_<n>/model.safetensors     trained tensors, canonical names
                               config.yaml           resolved configuration
                               manifest.json         versions, metrics, data, sizes and checksums of the files
                               resume/optimizer.pt   tensors and plain types only (read with weights_only)
                               resume/shards/        in its place where the optimiser was split over ranks
                               resume/state.json     counters, loss scaler
    <job>/checkpoints/last, best                     links to a step

Nothing here runs code from a file (no unrestricted pickle).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import CheckpointError, MiniGPT4Error
from minigpt4.common.files import write_atomically, writing
from minigpt4.common.shard_files import read_shards

log = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
OPTIMIZER = "resume/optimizer.pt"
SHARDS = "resume/shards"
STATE = "resume/state.json"
LAST = "last"
BEST = "best"

_BLOCK = 1 << 20
_STEP = re.compile(r"step_(\d+)$")
_JOB = re.compile(r"(\d{8}_\d{6})(?:_(\d+))?$")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; tensors are read when asked for."""

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def config_path(self) -> Path:
        """The resolved configuration of the run that wrote it."""
        return self.path / CONFIG

    @property
    def can_resume(self) -> bool:
        """Whether optimiser state and counters are there, not weights alone."""
        return OPTIMIZER in self.manifest["files"] or self.is_split

    @property
    def is_split(self) -> bool:
        """Whether the optimiser state lies in one file per rank that wrote it."""
        return any(name.startswith(f"{SHARDS}/") for name in self.manifest["files"])

    def check_content(self) -> None:
        """Reads every file once. Raises CheckpointError that names those whose bytes are not those written."""
        sums: dict[str, str] = self.manifest.get("checksums", {})  # absent in checkpoints of before
        wrong = [name for name, expected in sums.items() if _checksum(self.path / name) != expected]
        if wrong:
            raise CheckpointError(f"checkpoint '{self.path}': damaged, {', '.join(wrong)}: other bytes than written")

    def load_weights(self) -> dict[str, Tensor]:
        """Canonical name -> tensor on the CPU. Raises CheckpointError when the file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path / WEIGHTS)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / WEIGHTS}: not a readable safetensors file ({error})") from error

    def load_resume(
        self, parameters: Mapping[str, nn.Parameter] | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Optimiser state by parameter name, and the counters. Raises CheckpointError when there is none.

        parameters: by name; of a state that was split, moments are read as these are split now.
        """
        state = self.counters()
        if self.is_split:
            return read_shards(self.path / SHARDS, parameters), state
        try:
            optimizer = torch.load(self.path / OPTIMIZER, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{self.path / OPTIMIZER}: not readable ({str(error).splitlines()[0]})") from error
        return optimizer, state

    def counters(self) -> dict[str, Any]:
        """What a run keeps of itself beside weights and moments. Raises CheckpointError when there is none."""
        if not self.can_resume:
            raise CheckpointError(f"{self.path}: holds weights only (no resume/); use model.ckpt to start from it")
        return _read_json(self.path / STATE)


@dataclass(frozen=True)
class SharedDraft:
    """A checkpoint that every rank writes into, under a temporary name; ``finish`` waits for their parts."""

    folder: Path
    finish: Callable[[], None] = lambda: None


def start_shared_draft(directory: Path, step: int) -> SharedDraft:
    """Called on rank 0, which tells the others where to write: below ``SHARDS``. Raises OutputError."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        folder = _start_draft(directory, step)
        (folder / SHARDS).mkdir(parents=True)
    return SharedDraft(folder)


def _start_draft(directory: Path, step: int) -> Path:
    _remove_leftovers(directory)
    draft = directory / f".writing_step_{step}_{os.getpid()}"
    draft.mkdir()
    return draft


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    config_text: str,
    manifest: Mapping[str, Any],
    resume: Mapping[str, Any] | None,
    keep_last: int,
    is_best: bool = False,
    shared: SharedDraft | None = None,
) -> Path:
    """Write ``directory/step_<step>``, move ``last`` (and ``best``), delete old steps. Called on rank 0.

    resume: {"optimizer": state by name, "state": counters}, or None for weights alone.
    keep_last: how many steps stay besides the one ``best`` names; 0 keeps all.
    shared: where all ranks write the optimiser's state, which ``resume`` then has not.
    Raises OutputError when the disk takes no more; the checkpoints of before stay as they are.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        return _save(directory, step, weights, config_text, manifest, resume, keep_last, is_best, shared)


def _save(
    directory: Path,
    step: int,
    weights: Mapping[str, Tensor],
    config_text: str,
    manifest: Mapping[str, Any],
    resume: Mapping[str, Any] | None,
    keep_last: int,
    is_best: bool,
    shared: SharedDraft | None,
) -> Path:
    final = directory / f"step_{step}"
    draft = _start_draft(directory, step) if shared is None else shared.folder
    try:
        if shared is not None:
            shared.finish()  # first: nobody writes any more into a draft that is given up
        _write_files(draft, weights, config_text, resume)
        written = {str(file.relative_to(draft)): file for file in sorted(draft.rglob("*")) if file.is_file()}
        for file in written.values():
            _sync(file)
        content = {
            **{**manifest, "format": FORMAT, "step": step, "is_best": is_best},
            "files": {name: file.stat().st_size for name, file in written.items()},
            "checksums": {name: _checksum(file) for name, file in written.items()},
        }
        write_atomically(draft / MANIFEST, json.dumps(content, indent=1))
        for folder in ("resume", "") if resume is not None else ("",):
            _sync(draft / folder)
    except (OSError, MiniGPT4Error):
        shutil.rmtree(draft, ignore_errors=True)  # a full disk gets its room back
        raise
    if final.exists():  # the same step again, after a resume that had to pass it over
        _set_aside(final)
    draft.rename(final)
    _sync(directory)
    _link(directory / LAST, final.name)
    if is_best:
        _link(directory / BEST, final.name)
    _remove_leftovers(directory)
    _retain(directory, keep_last)
    return final


def read_checkpoint(path: str | Path, check_content: bool = False) -> Checkpoint:
    """Open a checkpoint directory, a link to one, a job folder (its last checkpoint) or a folder of jobs (the newest).

    check_content: every byte is read and compared with what was written, not the sizes alone; of a job or a folder of
    jobs it is then the newest checkpoint that passes. Raises CheckpointError that names what is missing or wrong.
    """
    given = Path(path)
    if given.is_file():
        raise CheckpointError(
            f"checkpoint '{given}': is a file, expected a directory; to start from weights use model.ckpt"
        )
    if not given.is_dir():
        raise CheckpointError(f"checkpoint '{given}': no such directory")
    folder = given.resolve()
    if (folder / "checkpoints").is_dir():
        found = find_last(folder, check_content)
        if found is None:
            raise CheckpointError(f"job folder '{given}': holds no complete checkpoint")
        return found
    newest = find_newest(folder, check_content)
    if newest is not None:
        return newest
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"checkpoint '{given}': incomplete, {MANIFEST} is missing")
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"checkpoint '{given}': format {manifest.get('format')!r} is unknown, known: {FORMAT}")
    if not isinstance(manifest.get("step"), int):
        raise CheckpointError(f"checkpoint '{given}': damaged, {MANIFEST} has no step")
    problems = []
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {size}")
    problems += [f"{name} is missing" for name in (WEIGHTS, CONFIG) if name not in manifest["files"]]
    if problems:
        raise CheckpointError(f"checkpoint '{given}': incomplete, " + "; ".join(problems))
    checkpoint = Checkpoint(folder, manifest["step"], manifest)
    if check_content:
        checkpoint.check_content()
    return checkpoint


def find_last(job_dir: Path, check_content: bool = False) -> Checkpoint | None:
    """The complete checkpoint of a job with the highest step; what ``read_checkpoint`` refuses is passed over.

    check_content: asked by whoever goes on from it, so a step that a kill left set aside gets its name back first.
    """
    for folder in (job_dir / "checkpoints").glob(".old_step_*") if check_content else ():
        final = folder.with_name(folder.name.removeprefix(".old_").rpartition("_")[0])
        with contextlib.suppress(OSError):  # what cannot be renamed cannot be written to either, and is passed over
            if not final.exists():
                folder.rename(final)
    for step in sorted(_steps(job_dir / "checkpoints"), reverse=True):
        try:
            return read_checkpoint(job_dir / "checkpoints" / f"step_{step}", check_content)
        except CheckpointError as error:
            log.warning("skipped: %s", error)
    return None


def is_last(checkpoint: Checkpoint) -> bool:
    """Whether its job has no later checkpoint that is whole to the last byte."""
    directory = checkpoint.path.parent
    later = [directory / f"step_{step}" for step in _steps(directory) if step > checkpoint.step]
    return not any(_is_complete(path, check_content=True) for path in later)


def find_newest(root: Path, check_content: bool = False) -> Checkpoint | None:
    """The last complete checkpoint of the newest job under ``root`` that has one."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _JOB.match(path.name)
        if match and path.is_dir():
            found.append(((match[1], int(match[2] or 1)), path))
    for _, job in sorted(found, reverse=True):
        point = find_last(job, check_content)
        if point is not None:
            return point
        log.warning("%s: holds no complete checkpoint, passed over", job)
    return None


def settle_links(checkpoint: Checkpoint) -> None:
    """Point ``last`` (and ``best``, if it was that) at a job's newest checkpoint, when a kill came before the links."""
    directory, name = checkpoint.path.parent, checkpoint.path.name
    for link, is_due in ((LAST, True), (BEST, checkpoint.manifest.get("is_best", False))):
        path = directory / link
        if is_due and not (path.is_symlink() and os.readlink(path) == name):
            _link(path, name)


def is_job_name(name: str) -> bool:
    """Whether a folder is named as a run names its own: ``20261231_235959`` or ``20261231_235959_2``."""
    return _JOB.match(name) is not None


def _write_files(
    draft: Path, weights: Mapping[str, Tensor], config_text: str, resume: Mapping[str, Any] | None
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        refusal = re.search(r"os error (\d+)", str(error))
        if refusal is None:
            raise
        raise OSError(int(refusal[1]), str(error), str(draft / WEIGHTS)) from error
    (draft / CONFIG).write_text(config_text, encoding="utf-8")
    if resume is not None:
        (draft / "resume").mkdir(exist_ok=True)
        if "optimizer" in resume:
            _write_optimizer(draft / OPTIMIZER, resume["optimizer"])
        (draft / STATE).write_text(json.dumps(resume["state"], indent=1), encoding="utf-8")


def _write_optimizer(path: Path, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the system's refusal, behind what torch says of it
            raise error.__context__ from error
        raise


def _sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk, so that a rename never outruns its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(link: Path, target: str) -> None:
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target, target_is_directory=True)
    os.replace(draft, link)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    matches = [(_STEP.fullmatch(entry.name), entry) for entry in directory.iterdir()]
    return [int(match[1]) for match, entry in matches if match and entry.is_dir()]


def _remove_leftovers(directory: Path) -> None:
    """Delete what a killed write left behind (rank 0 is the only writer of a job)."""
    for pattern in (".writing_step_*", ".old_step_*", ".drop_step_*"):
        for folder in directory.glob(pattern):
            shutil.rmtree(folder)
    for name in (LAST, BEST):
        for draft in directory.glob(f".{name}.*"):
            draft.unlink()


def _set_aside(folder: Path, prefix: str = "old") -> Path:
    """``folder`` under a temporary name: a final name never holds a checkpoint that is half deleted.

    One that is set aside as 'old' gets its name back if nothing comes into its place.
    """
    return folder.rename(folder.with_name(f".{prefix}_{folder.name}_{os.getpid()}"))


def _retain(directory: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` steps and those with a link; damaged ones count for nothing."""
    if keep_last <= 0:
        return
    kept = {os.readlink(directory / name) for name in (LAST, BEST) if (directory / name).is_symlink()}
    names = [f"step_{step}" for step in sorted(_steps(directory), reverse=True)]
    kept.update([name for name in names if _is_complete(directory / name)][:keep_last])
    for name in names:
        if name not in kept:
            shutil.rmtree(_set_aside(directory / name, "drop"))


def _checksum(file: Path) -> str:
    """CRC-32 of a file as eight hexadecimal digits: finds damage, is no signature."""
    total = 0
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            total = zlib.crc32(block, total)
    return f"{total:08x}"


def _is_complete(path: Path, check_content: bool = False) -> bool:
    try:
        read_checkpoint(path, check_content)
    except CheckpointError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
