"""A tiny model behind a real server on a free port of this machine."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from typing import Any

from PIL import Image

from minigpt4 import catalog
from minigpt4.chat.loading import Assistant
from minigpt4.common.schema import ProcessorConfig
from minigpt4.models.generation import GenerationMixin
from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor
from minigpt4.serve.api import Settings
from minigpt4.serve.pictures import PictureLimits
from minigpt4.serve.scheduler import Limits
from minigpt4.serve.server import Server, bind
from tests.golden_cases import build_model, load_case

VICUNA, V2 = "a_minigpt4_qformer_vicuna", "c_minigptv2_lora_instruction"
NAME, KEY = "tiny", "sk-test"


@cache
def tiny_assistant(case: str = V2, template: str = "minigpt_v2") -> Assistant:
    """A tiny random model."""
    catalog.load()
    model = build_model(load_case(case))
    assert isinstance(model, GenerationMixin)
    spec = ImageSpec(model.cfg.image_size, model.image_mean, model.image_std)
    image = make_image_processor(ProcessorConfig(name="blip2_image_eval"), spec)
    return Assistant(model, image, make_text_processor(ProcessorConfig()), template)


@dataclass
class Running:
    """A server and where it is."""

    server: Server
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def request(
        self, method: str, path: str, body: Any = None, key: str = KEY, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, JSON and headers of one request without a client library; ``body`` may be bytes."""
        connection = HTTPConnection(self.host, self.port, timeout=60)
        with contextlib.closing(connection):
            sent = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            given = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, sent, given)
            response = connection.getresponse()
            return response.status, json.loads(response.read()), {k.lower(): v for k, v in response.getheaders()}

    def refusal(self, **changes: Any) -> dict[str, Any]:
        """The error of a chat request that is not answered, with its status; ``changes`` are its fields."""
        status, content, _ = self.request("POST", "/v1/chat/completions", {"messages": asked("hello"), **changes})
        assert status >= 400, content
        return {"status": status, **content["error"]}

    def until_idle(self, seconds: float = 20) -> float:
        """Wait until nothing runs or waits; returns how long that took."""
        begun = time.monotonic()
        while self.server.scheduler.num_running or self.server.scheduler.num_waiting:
            assert time.monotonic() < begun + seconds, "answers go on"
            time.sleep(0.01)
        return time.monotonic() - begun


@contextlib.contextmanager
def serving(
    assistant: Assistant,
    limits: Limits | None = None,
    pictures: PictureLimits | None = None,
    settings: Settings | None = None,
) -> Iterator[Running]:
    """A server in a thread, and its end."""
    bound = bind("127.0.0.1", 0)
    server = Server(assistant, limits or Limits(), pictures or PictureLimits(), settings or Settings(NAME, KEY))
    thread = threading.Thread(target=server.answer, args=(bound,))
    host, port = bound.getsockname()
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Running(server, host, port)
    finally:
        server.should_exit = True
        thread.join()


def asked(*parts: str | Image.Image) -> list[dict[str, Any]]:
    """One message of a user."""
    return [{"role": "user", "content": [as_part(part) for part in parts]}]


def as_part(part: str | Image.Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": data_url(part), "detail": "low"}}


def data_url(image: Image.Image) -> str:
    """The picture as a PNG in text."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(colour: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture in one colour with a brighter half."""
    image = Image.new("RGB", size, colour)
    image.paste("white", (0, 0, size[0] // 2, size[1] // 2))
    return image
