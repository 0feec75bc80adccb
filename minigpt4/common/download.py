"""Weight files from the web: downloaded once per folder, resumable, checked, put in place whole.

Processes of one run need no process group for it: whoever gets the lock file first downloads, the others wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from minigpt4.common.errors import ConfigError

log = logging.getLogger(__name__)

RETRY_DELAYS_S: tuple[float, ...] = (1, 2, 4)
"""Pauses before another try; the count starts again whenever bytes have come."""
TIMEOUT_S = 30.0
LOG_EVERY_S = 10.0

_CHUNK = 1 << 20
_SHA256 = re.compile(r"sha256=([0-9a-fA-F]{64})")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


@dataclass(frozen=True)
class Link:
    """``url`` without its fragment, the file ``name`` it ends in, and the hash that was written behind ``#``."""

    key: str
    url: str
    name: str
    sha256: str

    @property
    def shown(self) -> str:
        """The address without its query, which may hold a password."""
        return self.url.partition("?")[0]


class _InterruptedError(Exception):
    """A transfer that may be tried again; the text says why it ended."""


def is_url(text: str) -> bool:
    """Whether ``text`` has a scheme (``https://``, ``s3://``, ...) and so is no path."""
    return _SCHEME.match(text) is not None


def parse_link(text: str, key: str) -> Link:
    """The parts of ``https://host/file.pth#sha256=<64 hex digits>``. Raises ConfigError naming ``key``."""
    parts = urlsplit(text)
    name = Path(unquote(parts.path)).name
    if parts.scheme.lower() not in ("http", "https"):
        raise ConfigError(f"{key}: '{text}' cannot be downloaded; allowed: a path, http:// or https://")
    if not parts.netloc or not name:
        raise ConfigError(f"{key}: '{text}' names no file; expected https://host/.../file")
    match = _SHA256.fullmatch(parts.fragment)
    if parts.fragment and match is None:
        raise ConfigError(f"{key}: '#{parts.fragment}' is not understood; allowed: #sha256=<64 hex digits>")
    return Link(key, parts._replace(fragment="").geturl(), name, match[1].lower() if match else "")


def download(text: str, folder: Path, key: str) -> Path:
    """The file behind a URL, in ``folder``: fetched when it is not there yet, and whole when this returns.

    A transfer that breaks off goes on where it stopped (``<name>.part``), also in a later run. key: the YAML key, for
    messages. Raises ConfigError when the file cannot be had or has another hash; it says where to put it by hand.
    """
    link = parse_link(text, key)
    path = folder / link.name
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(link, path) as report_failure:
                if not path.is_file():  # another process may have fetched it while this one waited
                    try:
                        _fetch(link, path)
                    except ConfigError as error:
                        report_failure(str(error))
                        raise
                    return path
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{key}: {link.shown} cannot be written to {path} ({reason})") from error
    if link.sha256:
        found = _sha256(path)
        if found != link.sha256:
            raise ConfigError(
                f"{key}: {path} is there but has sha256 {found}, expected {link.sha256}; nothing was deleted: "
                "move the file away to download it again, or correct the hash"
            )
    log.info("%s: using %s", key, path)
    return path


@contextlib.contextmanager
def _locked(link: Link, path: Path) -> Iterator[Callable[[str], None]]:
    """Holds ``<name>.lock``. Gives a function that leaves a message for those who wait: they fail with it too."""
    with path.with_name(f"{path.name}.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that downloads %s", link.key, path)
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            failure = file.read()
            if failure and not path.is_file():
                raise ConfigError(failure) from None

        def leave(message: str) -> None:
            file.truncate(0)  # opened for appending: written at the start again
            file.write(message)
            file.flush()

        leave("")
        yield leave


def _fetch(link: Link, path: Path) -> None:
    """Transfer into ``<name>.part`` until it is whole, check it, rename it."""
    part = path.with_name(f"{path.name}.part")
    by_hand = f"put the file at {path} by hand, or correct {link.key}"
    failures = 0
    while True:
        before = _size(part)
        try:
            _transfer(link, part)
            break
        except _InterruptedError as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures > len(RETRY_DELAYS_S):
                kept = f"; {_size(part)} bytes are kept and the next run goes on there" if _size(part) else ""
                raise ConfigError(
                    f"{link.key}: {link.shown} cannot be downloaded ({error}){kept}; {by_hand}"
                ) from error
            log.warning("%s: %s broke off (%s), trying again", link.key, link.shown, error)
            time.sleep(RETRY_DELAYS_S[failures - 1])
    found = _sha256(part) if link.sha256 else ""
    if found != link.sha256:
        part.unlink()
        _notes(part).unlink(missing_ok=True)
        raise ConfigError(
            f"{link.key}: what came from {link.shown} has sha256 {found}, expected {link.sha256}; the download was "
            f"thrown away, no other file was touched; {by_hand}"
        )
    os.replace(part, path)
    _notes(part).unlink(missing_ok=True)
    log.info("%s: downloaded %s (%.1f MB)", link.key, path, path.stat().st_size / 1e6)


def _transfer(link: Link, part: Path) -> None:
    """One request that completes ``part``. Raises _InterruptedError when it may be tried again, else ConfigError."""
    done = _resumable(link, part)
    if done and done == _read_notes(part).get("total"):
        return  # complete, but the process ended before the renaming
    request = urllib.request.Request(link.url, headers={"User-Agent": "minigpt4", "Accept-Encoding": "identity"})
    if done:
        request.add_header("Range", f"bytes={done}-")
        if _read_notes(part).get("validator"):  # a file that changed meanwhile is sent whole instead
            request.add_header("If-Range", str(_read_notes(part)["validator"]))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            _receive(link, response, part, done)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and done:
            part.unlink()  # longer than the file: begin again
            raise _InterruptedError("the part on disk does not fit the file") from error
        if error.code >= 500 or error.code in (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS):
            raise _InterruptedError(f"{error.code} {error.reason}") from error
        where = part.with_name(link.name)
        raise ConfigError(
            f"{link.key}: {link.shown} cannot be downloaded ({error.code} {error.reason}); "
            f"put the file at {where} by hand, or correct {link.key}"
        ) from error
    except urllib.error.URLError as error:
        raise _InterruptedError(f"no connection: {error.reason}") from error
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _InterruptedError(str(error) or type(error).__name__) from error


def _receive(link: Link, response: Any, part: Path, done: int) -> None:
    """The answer's bytes to the end of ``part``, or to its start when the server sends the whole file."""
    if response.headers.get_content_type() == "text/html":
        raise ConfigError(
            f"{link.key}: {link.shown} is a web page, not a file; name the address of the file itself, or download it "
            f"by hand to {part.with_name(link.name)}"
        )
    start, total = 0, _number(response.headers.get("Content-Length"))
    if response.status == http.client.PARTIAL_CONTENT:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start, total = (int(match[1]), _number(match[2])) if match else (-1, None)
        if start != done or total != _read_notes(part).get("total", total):
            part.unlink()
            raise _InterruptedError("the server sent another part than asked for")
    if total is not None and shutil.disk_usage(part.parent).free < total - start:
        raise OSError(errno.ENOSPC, f"no space: {(total - start) / 1e9:.1f} GB needed")
    etag = response.headers.get("ETag", "")
    validator = response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag
    _notes(part).write_text(json.dumps({"url": link.shown, "validator": validator, "total": total}), encoding="utf-8")
    with part.open("ab" if start else "wb") as file, _progress(link.name, start, total) as show:
        while chunk := _read(response):
            file.write(chunk)
            show(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and _size(part) != total:
        raise _InterruptedError(f"{_size(part)} of {total} bytes came")


def _read(response: Any) -> bytes:
    """The next bytes; empty at the end. A network error is told apart from a disk error here."""
    try:
        chunk: bytes = response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(str(error) or type(error).__name__) from error
    return chunk


def _resumable(link: Link, part: Path) -> int:
    """Bytes of ``part`` that can be kept; a part of another address is begun again."""
    if part.is_file() and _read_notes(part).get("url", link.shown) != link.shown:
        part.unlink()
    return _size(part)


def _notes(part: Path) -> Path:
    """Where a part came from and how to recognise the same file on the server."""
    return part.with_name(f"{part.name}.json")


def _read_notes(part: Path) -> dict[str, Any]:
    try:
        content = json.loads(_notes(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a part that was brought by other means: its length is checked at the end
        return {}
    return content if isinstance(content, dict) else {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Rate and time left: a bar on a terminal, a line every ten seconds elsewhere. Gives a function to feed bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from minigpt4.common.logger import console

    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(name, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    first = last = time.monotonic()
    came = 0

    def line(count: int) -> None:
        nonlocal last, came
        came += count
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            last, rate = now, came / (now - first)
            left = f" of {total / 1e6:.0f} MB, {(total - done - came) / rate:.0f} s left" if total else " MB"
            log.info("%s: %.0f%s (%.1f MB/s)", name, (done + came) / 1e6, left, rate / 1e6)

    yield line
