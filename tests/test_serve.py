"""The server as its clients see it: OpenAI's own client and plain HTTP against a real server with a tiny model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from minigpt4.chat.session import ChatSession
from minigpt4.cli import main as minigpt4_main
from minigpt4.models.generation import GenerateOptions
from minigpt4.serve.api import Settings
from minigpt4.serve.pictures import PictureLimits
from minigpt4.serve.scheduler import Limits
from tests.serve_parts import KEY, NAME, Running, asked, picture, serving, tiny_assistant

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures").resolve()
    picture("blue").save(folder / "blue.png")
    return folder


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Running]:
    limits = PictureLimits(root, max_bytes=20_000, max_pixels=10_000)
    with serving(tiny_assistant(), pictures=limits, settings=Settings(NAME, KEY, max_body=60_000)) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url, api_key=KEY, max_retries=0, timeout=60)


def ask(client: openai.OpenAI, *parts: Any, **options: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=asked(*parts), **{"max_tokens": 6, **options})


def test_an_answer_over_http_is_the_answer_of_a_chat(client: openai.OpenAI) -> None:
    session = ChatSession(tiny_assistant())
    session.set_image(picture())
    expected = session.ask("what is this?", GenerateOptions(max_new_tokens=6))
    reply = ask(client, picture(), "what is this?")
    assert reply.choices[0].message.content == expected
    assert (reply.object, reply.model, reply.choices[0].finish_reason) == ("chat.completion", NAME, "length")
    prompt = ChatSession.first_prompt(tiny_assistant(), "what is this?")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt.ids), 6)
    assert reply.usage.total_tokens == len(prompt.ids) + 6


def test_streamed_pieces_are_the_whole_answer_and_end_with_the_usage(client: openai.OpenAI) -> None:
    whole = ask(client, picture(), "why?")
    chunks = list(ask(client, picture(), "why?", stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3 and chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stop_text_ends_the_answer_with_reason_stop(client: openai.OpenAI) -> None:
    free = ask(client, picture(), "why?", max_tokens=12).choices[0].message.content
    stop = free[6:8]
    for is_streaming in (False, True):
        reply = ask(client, picture(), "why?", max_completion_tokens=12, max_tokens=12, stop=stop, stream=is_streaming)
        if is_streaming:
            chunks = list(reply)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
            assert reply.usage.completion_tokens < 12
        assert (text, reason) == (free.split(stop)[0].strip(), "stop")


def test_earlier_answers_and_pictures_are_part_of_the_question(client: openai.OpenAI) -> None:
    session = ChatSession(tiny_assistant())
    session.set_image(picture("red"))
    first = session.ask("what is this?", GenerateOptions(max_new_tokens=3))
    session.add_image(picture("green"))
    expected = session.ask("and this?", GenerateOptions(max_new_tokens=6))
    messages = [
        *asked("what is this?", picture("red")),  # a picture behind the text is shown in front of it, as in training
        {"role": "assistant", "content": first},
        *asked(picture("green"), "and this?"),
    ]
    reply = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6)  # type: ignore[arg-type]
    assert reply.choices[0].message.content == expected


def test_a_seed_makes_a_sampled_answer_repeatable(client: openai.OpenAI) -> None:
    def sampled(seed: int, is_streaming: bool = False) -> str:
        reply = ask(client, "why?", temperature=1.9, seed=seed, stream=is_streaming)
        if is_streaming:
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        return str(reply.choices[0].message.content)

    assert sampled(1) == sampled(1) == sampled(1, is_streaming=True) != sampled(2)


def test_a_file_below_the_root_is_the_picture(client: openai.OpenAI, root: Path) -> None:
    expected = ask(client, picture("blue"), "why?").choices[0].message.content
    for url in ("blue.png", f"{root}/blue.png", f"file://{root}/blue.png"):
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "why?"}]
        messages: Any = [{"role": "user", "content": parts}]
        reply = client.chat.completions.create(model=NAME, messages=messages, max_tokens=6)
        assert reply.choices[0].message.content == expected


def test_errors_arrive_as_the_client_s_own_exceptions(client: openai.OpenAI, running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="no system text|without a system text") as refused:
        client.chat.completions.create(
            model=NAME, messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
        )
    assert (refused.value.code, refused.value.param) == ("invalid_prompt", "messages")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9', this server has 'tiny'"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "why?"}])
    stranger = openai.OpenAI(base_url=running.url, api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="a valid key is needed"):
        ask(stranger, "why?")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_the_model_is_listed(client: openai.OpenAI, running: Running) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "minigpt4"
    status, content, _ = running.request("GET", "/health", key="")
    assert (status, content["status"], content["model"], content["waiting"]) == (200, "ready", NAME, 0)


def test_other_paths_and_methods_have_errors_of_the_same_shape(running: Running) -> None:
    status, content, _ = running.request("GET", "/v1/embeddings")
    expected = {
        "message": "GET /v1/embeddings: Not Found",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert (status, content) == (404, {"error": expected})
    assert running.request("GET", CHAT)[0] == 405
    assert running.request("POST", CHAT, b"{", headers={"Content-Type": "text/plain"})[0] == 415
    status, content, _ = running.request("POST", CHAT, b"{")
    assert (status, content["error"]["code"]) == (400, "invalid_json")


def test_what_is_too_large_is_told_with_413(running: Running) -> None:
    assert running.refusal(messages=asked("x" * 70_000))["code"] == "body_too_large"
    many_pixels = running.refusal(messages=asked(picture(size=(200, 60)), "why?"))
    assert (many_pixels["status"], many_pixels["code"]) == (413, "image_too_large")
    assert "200 x 60 pixels, allowed are 10000 in all" in many_pixels["message"]
    url = "data:image/png;base64," + "A" * 40_000
    part = {"type": "image_url", "image_url": {"url": url}}
    assert running.refusal(messages=[{"role": "user", "content": [part]}])["status"] == 413


def test_messages_longer_than_the_window_are_told_before_pictures_are_read(running: Running) -> None:
    link = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    content = [link, {"type": "text", "text": "x " * 20_000}]
    refused = running.refusal(messages=[{"role": "user", "content": content}])
    assert (refused["status"], refused["code"]) == (400, "context_length_exceeded")
    refused = running.refusal(messages=[{"role": "user", "content": [link]}])
    assert (refused["status"], refused["code"]) == (400, "invalid_image_url")


def test_the_log_has_times_and_tokens_but_no_text(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="minigpt4.serve.api"):
        answer = ask(client, "a secret question").choices[0].message.content
    (line,) = [record.getMessage() for record in caplog.records if record.name == "minigpt4.serve.api"]
    assert line.startswith("chat 200 batch=1 prompt=") and "images=0 answer=6 length queued=" in line
    assert "secret" not in line and str(answer) not in line


@dataclass
class Background:
    """A request in a thread: its status and error code, '' for an answer."""

    server: Running
    changes: dict[str, Any]

    def __post_init__(self) -> None:
        self.result: tuple[int, str] | None = None
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        body = {"messages": asked("why?"), "max_tokens": 400, **self.changes}
        status, content, _ = self.server.request("POST", CHAT, body)
        self.result = status, str(content.get("error", {}).get("code", ""))

    def outcome(self) -> tuple[int, str] | None:
        self.thread.join()
        return self.result


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "it did not come to that"
        time.sleep(0.005)


def test_a_full_queue_is_told_with_429_and_a_late_answer_with_504() -> None:
    slow = tiny_assistant()
    slow.model._lm.register_forward_pre_hook(lambda *_: time.sleep(0.01))  # 400 tokens take 4 s on any machine
    with serving(slow, Limits(max_batch=1, max_queue=1, timeout=1.5)) as server:
        scheduler = server.server.scheduler
        running = Background(server, {})
        until(lambda: scheduler.num_running == 1)
        waiting = Background(server, {"stream": True})
        until(lambda: scheduler.num_waiting == 1)
        status, content, headers = server.request("POST", CHAT, {"messages": asked("hello")})
        assert (status, content["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
        assert content["error"]["type"] == "rate_limit_error"
        assert running.outcome() == (504, "timeout")
        assert waiting.outcome() == (504, "timeout")
        assert server.until_idle() < 3


def test_a_request_that_never_arrives_is_given_up_with_408() -> None:
    with serving(tiny_assistant(), Limits(timeout=0.3)) as server:
        headers = {"Content-Length": "1000"}
        status, content, _ = server.request("POST", CHAT, b'{"messages": ', headers=headers)
        assert (status, content["error"]["message"]) == (408, "the request did not arrive within 0.3 s")
        assert server.server.scheduler.num_waiting == 0


def test_a_client_that_leaves_stops_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    with (
        serving(tiny_assistant(), Limits(max_batch=1)) as server,
        caplog.at_level(logging.INFO, logger="minigpt4.serve.api"),
    ):
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            ask(client, "why?", max_tokens=400)
        stream = ask(client, "why?", max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
        assert server.until_idle() < 4
        until(lambda: sum(record.getMessage().startswith("chat 499 ") for record in caplog.records) == 2)


def test_at_the_end_running_answers_finish_and_waiting_requests_are_told_503() -> None:
    with serving(tiny_assistant(), Limits(max_batch=1)) as server:
        scheduler = server.server.scheduler
        running = Background(server, {"max_tokens": 20})
        until(lambda: scheduler.num_running == 1)
        waiting = Background(server, {})
        until(lambda: len(scheduler.waiting()) == 1)
        server.server.should_exit = True
        assert waiting.outcome() == (503, "stopping")
        assert running.outcome() == (200, "")


def test_an_answer_longer_than_the_grace_time_is_ended_with_503() -> None:
    with serving(tiny_assistant(), Limits(grace=0.3)) as server:
        running = Background(server, {})
        until(lambda: server.server.scheduler.num_running == 1)
        server.server.should_exit = True
        assert running.outcome() == (503, "stopping")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-batch", "0"], "--max-batch must be > 0, got 0"),
        (["--temperature", "3"], "--temperature must be from 0 to 2"),
        (["--image-root", "nowhere"], "--image-root nowhere: no such folder"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 8000: "),
        (["--port", "0"], "name a checkpoint directory"),
    ],
)
def test_wrong_flags_are_told_before_weights_load(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert minigpt4_main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_is_told_before_weights_load(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert minigpt4_main(["serve", "--ckpt", "nowhere", "--port", str(running.port)]) == 2
    assert f"--host 127.0.0.1 --port {running.port}: Address already in use" in capsys.readouterr().err
