"""The HTTP side: ``/v1/chat/completions``, ``/v1/models`` and ``/health``."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minigpt4.models.row_answers import Answer
from minigpt4.serve.errors import ApiError, shown
from minigpt4.serve.prompts import Prepared, Preparer
from minigpt4.serve.replies import Reply, event, finish_reason
from minigpt4.serve.requests import ChatRequest, Defaults, parse
from minigpt4.serve.scheduler import Event, Job, Place, Scheduler

log = logging.getLogger(__name__)

_PREPARING = 4
"""Requests whose pictures are decoded at once: their pixels are what takes memory."""
_GONE = 499
"""Status in the log of a client that left."""


@dataclass(frozen=True)
class Settings:
    """name: of the model. api_key: '' = none is asked for. max_body: bytes. logs_text: prompts and answers too."""

    name: str
    api_key: str = ""
    max_body: int = 32_000_000
    defaults: Defaults = field(default_factory=Defaults)
    logs_text: bool = False


class Exchange:
    """One request, its job and its log line."""

    def __init__(self, request: Request, timeout: float, place: Place) -> None:
        self.request, self.timeout, self.place = request, timeout, place
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.chat: ChatRequest | None = None
        self.job: Job | None = None
        self.answer: Answer | None = None
        self.status, self.code = 200, ""
        self._watch: asyncio.Task[None] | None = None

    async def before_deadline(self, work: Awaitable[Any], status: int) -> Any:
        """The result of ``work``. Raises ApiError with ``status`` when the time of the request is over."""
        try:
            return await asyncio.wait_for(work, max(self.deadline - time.monotonic(), 0))
        except TimeoutError as error:
            what = "the request did not arrive" if status == 408 else "no answer"
            raise ApiError(status, f"{what} within {self.timeout:g} s", code="timeout", retry_after=5) from error

    async def body(self, limit: int) -> bytes:
        """What the client sends. Raises ApiError 413 past ``limit`` bytes."""
        too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large")
        told = self.request.headers.get("content-length", "")
        if told.isdecimal() and int(told) > limit:
            raise too_large
        body = bytearray()
        try:
            async for part in self.request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
        except ClientDisconnect as error:
            raise ApiError(_GONE, "the client left") from error
        return bytes(body)

    def queue(self, prepared: Prepared, chat: ChatRequest, scheduler: Scheduler) -> None:
        """Ask the model."""
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.job = Job(prepared, chat.is_streaming, self.deadline, self.place, deliver)
        scheduler.submit(self.job)
        self._watch = asyncio.create_task(self._until_gone(self.job))

    async def _until_gone(self, job: Job) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        if not job.is_over:
            job.cancel()
            self.events.put_nowait(ApiError(_GONE, "the client left"))

    async def next_event(self) -> str | Answer:
        """What the model says next. Raises ApiError when it will say nothing more."""
        told = await self.before_deadline(self.events.get(), 504)
        if isinstance(told, ApiError):
            raise told
        if isinstance(told, Answer):
            self.answer = told
        piece: str | Answer = told
        return piece

    def failed(self, error: ApiError) -> None:
        """Keep what the log line says of it."""
        self.status, self.code = error.status, error.code or ""

    def close(self, logs_text: bool) -> None:
        """Stop what still runs and write the log line."""
        if self.job is not None:
            if self.status == 200 and not self.job.is_over:
                self.status = _GONE
            self.job.cancel()
        if self._watch is not None:
            self._watch.cancel()
        log.info("%s", self.line())
        if logs_text and self.chat is not None:
            asked = [shown(message.text, 500) for message in self.chat.messages]
            log.info("asked %s, answered %s", asked, shown(self.answer.text if self.answer else None, 500))

    def line(self) -> str:
        """Times in ms since the arrival, and tokens."""

        def since(moment: float) -> str:
            return f"{(moment - self.arrived) * 1000:.0f}" if moment else "-"

        words = [f"chat {self.status}", *([self.code] if self.code else [])]
        if self.job is not None:
            prompt, times = self.job.prepared.prompt, self.job.times
            words += [
                "stream" if self.job.is_streaming else f"batch={self.job.batch_size}",
                f"prompt={len(prompt.ids)} images={prompt.num_images}",
                f"answer={self.answer.num_tokens} {finish_reason(self.answer)}" if self.answer else "answer=-",
                f"queued={since(times.queued)} started={since(times.started)} first={since(times.first)}",
            ]
        return " ".join([*words, f"done={since(time.monotonic())} ms"])


class Api:
    """What the routes share."""

    def __init__(self, preparer: Preparer, scheduler: Scheduler, settings: Settings) -> None:
        self.preparer, self.scheduler, self.settings = preparer, scheduler, settings
        self.begun = time.time()
        self._pool = ThreadPoolExecutor(_PREPARING, thread_name_prefix="prepare")

    def check_key(self, request: Request) -> None:
        """Raises ApiError 401 for a missing or wrong key."""
        if not self.settings.api_key:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self.settings.api_key.encode()):
            raise ApiError(401, "a valid key is needed: Authorization: Bearer ...", code="invalid_api_key")

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        self.check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # any web page may send other types to a server on this machine without asking the browser
            raise ApiError(415, "Content-Type must be application/json", code="invalid_content_type")
        exchange = Exchange(request, self.scheduler.limits.timeout, self.scheduler.take_place())
        try:
            reply, told = await self._begin(exchange)
        except ApiError as error:
            exchange.failed(error)
            self._end(exchange)
            raise
        except BaseException:  # our own mistake, or the server ends: the place must not stay taken
            exchange.status = 500
            self._end(exchange)
            raise
        if exchange.chat is not None and exchange.chat.is_streaming:
            stream = self._stream(exchange, reply, told, exchange.chat.with_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        assert isinstance(told, Answer), "only streams come in pieces"
        self._end(exchange)
        return JSONResponse(reply.completion(told))

    async def _begin(self, exchange: Exchange) -> tuple[Reply, str | Answer]:
        """Read and queue a request; returns at the first word of its answer, until then an error has its status."""
        body = await exchange.before_deadline(exchange.body(self.settings.max_body), 408)
        loop = asyncio.get_running_loop()
        chat = exchange.chat = await loop.run_in_executor(self._pool, parse, body, self.settings.defaults)
        self.check_name(chat.model)
        work = loop.run_in_executor(self._pool, self.preparer, chat)
        prepared: Prepared = await exchange.before_deadline(work, 504)
        exchange.queue(prepared, chat, self.scheduler)
        return Reply(self.settings.name, len(prepared.prompt.ids)), await exchange.next_event()

    async def _stream(
        self, exchange: Exchange, reply: Reply, told: str | Answer, with_usage: bool
    ) -> AsyncIterator[bytes]:
        try:
            yield reply.first_chunk(with_usage)
            while isinstance(told, str):
                yield reply.chunk(told, with_usage)
                told = await exchange.next_event()
            yield reply.last_chunks(told, with_usage)
        except ApiError as error:
            exchange.failed(error)
            yield event(error.body())
        finally:
            self._end(exchange)

    def _end(self, exchange: Exchange) -> None:
        self.scheduler.give_back(exchange.place)
        exchange.close(self.settings.logs_text)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not here."""
        if name is not None and name != self.settings.name:
            raise ApiError(
                404, f"no model {shown(name)}, this server has '{self.settings.name}'", "model", "model_not_found"
            )

    def model_card(self) -> dict[str, Any]:
        """The model as ``/v1/models`` lists it."""
        return {"id": self.settings.name, "object": "model", "created": int(self.begun), "owned_by": "minigpt4"}

    def health(self) -> JSONResponse:
        """``GET /health``: 200 while requests are answered."""
        state = self.scheduler.state
        content = {
            "status": state,
            "model": self.settings.name,
            "waiting": self.scheduler.num_waiting,
            "running": self.scheduler.num_running,
            "uptime_s": round(time.time() - self.begun, 1),
        }
        return JSONResponse(content, 200 if state == "ready" else 503)


def make_app(api: Api) -> FastAPI:
    """The application; every error has OpenAI's shape."""
    app = FastAPI(title="minigpt4 serve", docs_url=None, redoc_url=None, openapi_url=None)

    def list_models(request: Request) -> dict[str, Any]:
        api.check_key(request)
        return {"object": "list", "data": [api.model_card()]}

    def show_model(request: Request, name: str) -> dict[str, Any]:
        api.check_key(request)
        api.check_name(name)
        return api.model_card()

    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", show_model, methods=["GET"])
    app.add_api_route("/health", api.health, methods=["GET"], response_model=None)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(500, _refused)
    return app


def _refused(request: Request, error: Exception) -> Response:
    """The response of an error: ours, Starlette's (no such path, wrong method), or one of our own mistakes."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    if not isinstance(error, ApiError):
        error = ApiError(500, "an error of the server; its log has the reason")
    return JSONResponse(error.body(), error.status, error.headers())
