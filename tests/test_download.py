"""Downloads of weights against a server on this machine: resumed, checked, done once."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt4.common import download as module
from minigpt4.common.download import download, is_url, parse_link
from minigpt4.common.errors import ConfigError

CONTENT = os.urandom(3 << 20)
ROOT = Path(__file__).resolve().parent.parent
HASH = hashlib.sha256(CONTENT).hexdigest()


class _Server(http.server.ThreadingHTTPServer):
    """One file at any path; counts requests and misbehaves on demand."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.etag = '"one"'
        self.knows_ranges = True
        self.break_after: list[int] = []  # bytes after which the coming answers break off
        self.status = 200
        self.content_type = "application/octet-stream"
        self.wait = threading.Event()
        self.wait.set()
        self.ranges: list[str | None] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle of an answer is part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/folder/tower.pth"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.ranges.append(asked)
        server.wait.wait(20)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        is_same = self.headers.get("If-Range", server.etag) == server.etag
        if asked and server.knows_ranges and is_same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Type", server.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[: server.break_after.pop(0)] if server.break_after else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(module, "RETRY_DELAYS_S", (0.0, 0.0))
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_once_and_is_used_from_then_on(server: _Server, tmp_path: Path) -> None:
    path = download(f"{server.url}#sha256={HASH}", tmp_path / "weights", "model.ckpt")
    assert path == tmp_path / "weights" / "tower.pth" and path.read_bytes() == CONTENT
    assert download(server.url, tmp_path / "weights", "model.ckpt") == path
    assert server.ranges == [None]
    assert _names(path.parent) == ["tower.pth", "tower.pth.lock"]


def test_a_broken_transfer_goes_on_where_it_stopped(server: _Server, tmp_path: Path) -> None:
    server.break_after = [1 << 20, 1 << 10]
    path = download(server.url, tmp_path, "model.ckpt")
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={1 << 20}-", f"bytes={(1 << 20) + (1 << 10)}-"]


def test_a_later_run_goes_on_with_the_part_of_the_first(server: _Server, tmp_path: Path) -> None:
    server.break_after = [1000, 0, 0, 0]
    with pytest.raises(ConfigError, match=r"1000 bytes are kept and the next run goes on there; put the file at .*pth"):
        download(server.url, tmp_path, "model.ckpt")
    assert _names(tmp_path) == ["tower.pth.lock", "tower.pth.part", "tower.pth.part.json"]
    server.ranges.clear()
    server.break_after = []
    assert download(server.url, tmp_path, "model.ckpt").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_whole_part_that_was_not_renamed_needs_no_request(server: _Server, tmp_path: Path) -> None:
    server.break_after = [1000, 0, 0, 0]
    with pytest.raises(ConfigError):
        download(server.url, tmp_path, "model.ckpt")
    (tmp_path / "tower.pth.part").write_bytes(CONTENT)
    server.ranges.clear()
    assert download(server.url, tmp_path, "model.ckpt").read_bytes() == CONTENT
    assert server.ranges == []


@pytest.mark.parametrize("change", ["ranges", "etag", "too long", "other address"])
def test_a_part_that_cannot_be_continued_is_begun_again(server: _Server, tmp_path: Path, change: str) -> None:
    server.break_after = [1000, 0, 0, 0]
    with pytest.raises(ConfigError):
        download(server.url, tmp_path, "model.ckpt")
    server.break_after = []
    url = server.url
    if change == "ranges":
        server.knows_ranges = False
    elif change == "etag":
        server.content, server.etag = CONTENT[::-1], '"two"'
    elif change == "too long":
        (tmp_path / "tower.pth.part").write_bytes(CONTENT + b"more")
    else:
        url = url.replace("/folder/", "/other/")
    assert download(url, tmp_path, "model.ckpt").read_bytes() == server.content


def test_a_wrong_hash_throws_the_download_away_and_nothing_else(server: _Server, tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=f"has sha256 {HASH}, expected {'0' * 64}; the download was thrown away"):
        download(f"{server.url}#sha256={'0' * 64}", tmp_path, "model.ckpt")
    assert _names(tmp_path) == ["other.pth", "tower.pth.lock"]
    (tmp_path / "tower.pth").write_bytes(b"put here by hand")
    with pytest.raises(ConfigError, match="is there but has sha256 .*; nothing was deleted"):
        download(f"{server.url}#sha256={HASH}", tmp_path, "model.ckpt")
    assert (tmp_path / "tower.pth").read_bytes() == b"put here by hand"


def test_a_page_that_is_not_there_says_where_the_file_may_be_put(server: _Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(ConfigError) as raised:
        download(f"{server.url}?token=secret", tmp_path, "model.vit_weights")
    assert "model.vit_weights: http" in str(raised.value) and "404" in str(raised.value)
    assert f"put the file at {tmp_path / 'tower.pth'} by hand" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert len(server.ranges) == 1  # asking again would not help


def test_an_overloaded_server_is_asked_again(server: _Server, tmp_path: Path) -> None:
    server.status = 503
    with pytest.raises(ConfigError, match="503"):
        download(server.url, tmp_path, "model.ckpt")
    assert len(server.ranges) == 3


def test_a_web_page_is_not_taken_for_weights(server: _Server, tmp_path: Path) -> None:
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(ConfigError, match="is a web page, not a file"):
        download(server.url, tmp_path, "model.ckpt")
    assert _names(tmp_path) == ["tower.pth.lock"]


def test_a_machine_without_network_is_told_apart(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.server_close()  # nobody listens on this port any more
    with pytest.raises(ConfigError, match="no connection: .*put the file at"):
        download(server.url, tmp_path, "model.ckpt")


def test_a_disk_without_room_is_told_before_anything_comes(
    server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1 << 20

    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(ConfigError, match="no space: 0.0 GB needed"):
        download(server.url, tmp_path, "model.ckpt")
    assert not (tmp_path / "tower.pth.part").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket/x.pth", "allowed: a path, http:// or https://"),
        ("https://host/", "names no file"),
        ("https://host/x.pth#sha256=12", "allowed: #sha256=<64 hex digits>"),
        ("https://host/x.pth#md5=12", "'#md5=12' is not understood"),
    ],
)
def test_an_address_that_cannot_work_is_refused_at_once(text: str, message: str) -> None:
    assert is_url(text)
    with pytest.raises(ConfigError, match=message):
        parse_link(text, "model.ckpt")


def test_paths_are_no_addresses() -> None:
    assert not any(map(is_url, ("weights/x.pth", "/a/b.pth", "C:/x", "~/x", "org/name")))


_CHILD = """
import sys
from pathlib import Path
from minigpt4.common.download import download
print(download(sys.argv[1], Path(sys.argv[2]), "model.ckpt").stat().st_size)
"""


def test_two_processes_at_once_download_once(server: _Server, tmp_path: Path) -> None:
    server.wait.clear()
    command = [sys.executable, "-c", _CHILD, server.url, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    threading.Timer(0.5, server.wait.set).start()  # the second comes while the first is busy, or finds the file
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [str(len(CONTENT))] * 2
    assert server.ranges == [None]


@pytest.mark.parametrize("outcome", ["fails", "succeeds", "dies"])
def test_who_waits_for_a_download_shares_its_outcome(
    server: _Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, outcome: str
) -> None:
    caplog.set_level("INFO", logger="minigpt4.common.download")
    path, answers = tmp_path / "tower.pth", []

    def other_rank() -> None:
        try:
            answers.append(download(server.url, tmp_path, "model.ckpt").read_bytes())
        except ConfigError as error:
            answers.append(str(error))

    with module._locked(parse_link(server.url, "model.ckpt"), path) as report_failure:
        thread = threading.Thread(target=other_rank)
        thread.start()
        while "waiting for another process" not in caplog.text:
            time.sleep(0.01)
        if outcome == "fails":
            report_failure("no such file")
        elif outcome == "succeeds":
            path.write_bytes(b"from the other process")
    thread.join(20)
    expected = {"fails": "no such file", "succeeds": b"from the other process", "dies": CONTENT}
    assert answers == [expected[outcome]]
    assert len(server.ranges) == (outcome == "dies")
