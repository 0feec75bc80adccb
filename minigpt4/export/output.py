"""The place an export is written to: under a temporary name until it has been checked, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt4.common.errors import CheckpointError, ConfigError

MARKER = "export.json"
"""Written into every exported folder; ``--force`` replaces nothing that lacks it."""


def check_destination(out: Path, force: bool) -> None:
    """Raises ConfigError when ``out`` is taken, or when replacing it could destroy something else than an export."""
    if out.resolve().parent == out.resolve():
        raise ConfigError(f"--out '{out}' is the root of the file system")
    for parent in out.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"--out '{out}': '{parent}' is a file, not a directory")
    if not os.path.lexists(out):
        return
    if not force:
        raise ConfigError(f"--out '{out}' exists; choose another name, or replace it with --force")
    if out.is_symlink() or (out.is_file() and out.suffix != ".pth"):
        raise ConfigError(f"--out '{out}' is not an exported folder; --force does not replace it")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ConfigError(f"--out '{out}' holds other files and no {MARKER} of an export; --force does not replace it")


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out``; whatever is left of it at the end is removed."""
    draft = out.with_name(f"{out.name}.writing-{os.getpid()}")
    try:
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
        yield draft
    except OSError as error:
        if error.errno is None:  # a library's own; only the system's are about the disk
            raise
        raise CheckpointError(f"--out '{out}' cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, out: Path) -> None:
    """Give ``draft`` (a folder, or one file) its final name, once it is on the disk.

    What stood there leaves by a rename, not file by file, and comes back when the new name cannot be given.
    """
    for file in [draft] if draft.is_file() else draft.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                os.fsync(content.fileno())
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if os.path.lexists(out):
        out.rename(old)
    try:
        draft.rename(out)
    except OSError:
        if os.path.lexists(old):
            old.rename(out)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file."""
    from safetensors.torch import save_file

    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(copies, path, metadata={"format": "pt"})


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """``model.safetensors``, or shards of 5 GB with their index, as transformers reads them."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(tensors), str(folder), max_shard_size="5GB", metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable JSON."""
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def size_of(path: Path) -> str:
    """Number and total size of the files under ``path``."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    unit, bytes_per = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if size >= pair[1]), ("kB", 1e3))
    return f"{len(files)} file{'s' if len(files) != 1 else ''}, {size / bytes_per:.1f} {unit}"
