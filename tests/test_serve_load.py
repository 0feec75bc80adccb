"""The server under load, and as a process of its own."""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from minigpt4 import catalog
from minigpt4.chat.session import ChatSession
from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.config import dump_config
from minigpt4.common.schema import Config, RunConfig
from minigpt4.models.generation import GenerateOptions
from minigpt4.serve.scheduler import Limits
from tests.config_fakes import REPOSITORY
from tests.golden_cases import build_model, load_case
from tests.serve_parts import KEY, NAME, V2, asked, picture, serving, tiny_assistant

QUESTIONS = ("what is this?", "why?", "is the mouth open?", "who else is in the picture?")
COLOURS = ("red", "blue", "green", "black", "yellow")
NUM_REQUESTS, NUM_CLIENTS, TOKENS = 200, 16, 6
LONG = 1000
"""Tokens that take seconds on any machine: the tiny model never ends its answer to the first question."""


def single_answers() -> dict[tuple[str, str], str]:
    """What a chat answers to every question about every picture."""
    answers = {}
    for colour in COLOURS:
        for question in QUESTIONS:
            session = ChatSession(tiny_assistant())
            session.set_image(picture(colour))
            answers[colour, question] = session.ask(question, GenerateOptions(max_new_tokens=TOKENS))
    return answers


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    expected = single_answers()
    assert len(set(expected.values())) > 12  # a mix-up shows
    wishes = [(COLOURS[n % 5], QUESTIONS[n % 4], n % 10 == 9) for n in range(NUM_REQUESTS)]
    with serving(tiny_assistant(), Limits(max_batch=8)) as server:
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=300)

        def ask(wish: tuple[str, str, bool]) -> tuple[str, float]:
            colour, question, is_streaming = wish
            begun = time.perf_counter()
            messages = asked(picture(colour), question)
            reply = client.chat.completions.create(  # type: ignore[call-overload]
                model=NAME, messages=messages, max_tokens=TOKENS, stream=is_streaming
            )
            if is_streaming:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
            else:
                text = reply.choices[0].message.content
            return text, time.perf_counter() - begun

        begun = time.perf_counter()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            results = list(pool.map(ask, wishes))
        seconds = time.perf_counter() - begun
        server.until_idle()
    assert [text for text, _ in results] == [expected[colour, question] for colour, question, _ in wishes]
    times = sorted(one for _, one in results)
    with capsys.disabled():
        p50, p95 = statistics.median(times), times[int(len(times) * 0.95)]
        print(f"\n{NUM_REQUESTS} requests, {NUM_CLIENTS} at once: p50 {p50:.2f} s, p95 {p95:.2f} s, ", end="")
        print(f"{NUM_REQUESTS / seconds:.1f} requests/s")


def wait_for(url: str, **counts: int) -> None:
    """Until ``/health`` of the server at ``url`` counts that many requests."""
    end = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=60) as response:
            health = json.load(response)
        if {key: health[key] for key in counts} == counts:
            return
        assert time.monotonic() < end, health
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    catalog.load()
    model = build_model(load_case(V2))
    checkpoint = save_checkpoint(
        tmp_path / "checkpoints",
        3,
        weights=model.trainable_state(),
        config_text=dump_config(Config(model=model.cfg, datasets={}, run=RunConfig())),
        manifest={},
        resume=None,
        keep_last=1,
    )
    command = [sys.executable, "-m", "minigpt4", "serve", "--ckpt", str(checkpoint), "--port", "0"]
    command += ["--max-batch", "1", "--grace", "250"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        lines = []
        while not (found := re.search(r"answers at (http://127\.0\.0\.1:\d+/v1)", lines[-1] if lines else "")):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=5, timeout=120)
        assert client.models.list().data[0].id == "minigpt_v2"

        def ask() -> int:
            once = client.with_options(max_retries=0)
            try:
                once.chat.completions.create(model="minigpt_v2", messages=asked(QUESTIONS[0]), max_tokens=LONG)  # type: ignore[arg-type]
            except openai.APIStatusError as error:
                return error.status_code
            return 200

        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(ask)
            wait_for(found[1], running=1, waiting=0)
            waiting = pool.submit(ask)
            wait_for(found[1], running=1, waiting=1)
            process.send_signal(number)
            assert (running.result(), waiting.result()) == (200, 503)
        rest = process.stdout.read()
        assert process.wait(60) == 0
        assert "stopping: 1 answers run, 1 requests wait" in rest and rest.rstrip().endswith("stopped")
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
