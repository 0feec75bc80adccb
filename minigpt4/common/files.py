"""Text files that are whole or absent, and room for them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from minigpt4.common.errors import OutputError

_ELSEWHERE = "; choose another folder (of a run: run.output_dir)"
_FEWER = " (of a run: run.keep_last keeps fewer checkpoints)"
_REFUSALS = {
    errno.ENOSPC: "the disk is full; make room" + _FEWER,
    errno.EDQUOT: "your quota is used up; make room" + _FEWER,
    errno.EFBIG: "the file grew beyond the limit that is set here (ulimit -f)",
    errno.EROFS: "the file system is read-only" + _ELSEWHERE,
    errno.EACCES: "no permission to write there" + _ELSEWHERE,
    errno.EPERM: "no permission to write there" + _ELSEWHERE,
    errno.ENOTDIR: "a part of this path is a file, not a folder" + _ELSEWHERE,
    errno.EIO: "the disk or the network below it failed",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around the code that writes ``path`` or below it: OutputError with file and cause when the system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise OutputError(f"cannot write {error.filename or path}: {_REFUSALS[error.errno]}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: readers see the old file or the whole new one, also after a failure."""
    with open_atomically(path) as file:
        file.write(text)


@contextmanager
def open_atomically(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write piece by piece that takes the place of ``path`` when the block ends without an error.

    Line ends are written as they are given. Raises OutputError when the system refuses.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with draft.open("w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)  # gone already when all went well


def free_disk(path: Path) -> int:
    """Bytes that can be written below ``path``, which need not exist yet."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free
