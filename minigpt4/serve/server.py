"""The process: a socket, the scheduler and uvicorn, from the first request to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from minigpt4.chat.loading import Assistant
from minigpt4.common.errors import ConfigError
from minigpt4.serve.api import Api, Settings, make_app
from minigpt4.serve.pictures import PictureLimits
from minigpt4.serve.prompts import Preparer
from minigpt4.serve.scheduler import Limits, Scheduler

log = logging.getLogger(__name__)

_LAST_WORDS = 5
"""Seconds that connections get after the grace time, to send what was told to them."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: bound before weights load, so that a taken port is told at once.

    Port 0 takes a free one. Raises ConfigError.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}") from error
    return bound


class Server(uvicorn.Server):
    """uvicorn with our end: what waits is told 503 at once, what runs gets the grace time, then 503 too."""

    def __init__(self, assistant: Assistant, limits: Limits, pictures: PictureLimits, settings: Settings) -> None:
        self.scheduler = Scheduler(assistant.model, limits, self._stop_failed)
        app = make_app(Api(Preparer(assistant, pictures), self.scheduler, settings))
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=65,  # longer than clients keep connections, which else meet a closed one
                timeout_graceful_shutdown=int(limits.grace) + _LAST_WORDS,
            )
        )

    def answer(self, bound: socket.socket) -> int:
        """Answer requests until a signal comes; returns the exit code, 1 when the model failed for good."""
        self.scheduler.start()
        try:
            self.run([bound])
        finally:
            self.scheduler.stop()
            self.scheduler.join()
        log.info("stopped")
        return 1 if self.scheduler.has_failed else 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once it is to end."""
        log.info("stopping: %d answers run, %d requests wait", self.scheduler.num_running, self.scheduler.num_waiting)
        self.scheduler.drain()
        asyncio.get_running_loop().call_later(self.scheduler.limits.grace, self.scheduler.stop)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but a signal that was obeyed is not raised again: the exit code is ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_failed(self) -> None:
        self.should_exit = True
