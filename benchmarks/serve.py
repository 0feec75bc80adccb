"""The server under load: latency and throughput with 1, 4 and 16 clients, with batches and without.

    python benchmarks/serve.py                        48 requests per mode, 48 tokens per answer
    python benchmarks/serve.py --quick --json out.json

The model of the chat benchmark (MiniGPT-v2, EVA-like 256 x 6, Llama 512 x 8), random weights, on the CPU in float32
with one thread, greedy. Clients send pictures as data URLs over HTTP and wait for each answer before they ask again.
Every answer must be the one the model gives to that request alone before any figure is printed. Batches on and off take
turns at every number of clients, so that a busy machine slows both. Seconds are those of the clock: what a client
waits. CPU-seconds per request, clients included, are disturbed less.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.shared import parser, write_json  # noqa: E402

CLIENTS = (1, 4, 16)
QUESTIONS = ("What is this?", "Why?", "Is the mouth open?", "Who else is in the picture?")
COLOURS = ("red", "blue", "green", "black", "yellow", "white", "grey", "orange")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 1 when an answer is not the single one."""
    options = parser(__doc__, "16 requests with answers of 8 tokens")
    options.add_argument("--requests", type=int, default=48, help="per mode, at most 4 per client (default 48)")
    options.add_argument("--tokens", type=int, default=48, help="length of every answer (default 48)")
    given = options.parse_args(argv)
    count, tokens = (16, 8) if given.quick else (given.requests, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        assistant = build(Path(folder))
    bodies = [body(number, tokens) for number in range(count)]
    expected = alone(assistant, bodies)
    cells: dict[str, dict[str, float]] = {}
    wrong = 0
    for clients in CLIENTS:
        for mode, max_batch in (("on", 16), ("off", 1)):
            print(f"{clients} clients, batches {mode}", file=sys.stderr, flush=True)
            sent = bodies[: 4 * clients]
            answers, cells[f"{clients} {mode}"] = load(assistant, max_batch, clients, sent)
            wrong += sum(answer != right for answer, right in zip(answers, expected[: len(sent)], strict=True))
    figures = {"cells": cells, "wrong": wrong, "distinct": len(set(expected)), "ratios": ratios(cells)}
    write_json(given.json, figures)
    if wrong:
        print(f"{wrong} answers are not those of single requests; no figure is printed")
        return 1
    report(figures)
    return 0


def build(folder: Path) -> Any:
    """The assistant around a random model."""
    from benchmarks.chat import build as build_model
    from minigpt4 import catalog
    from minigpt4.chat.loading import Assistant
    from minigpt4.common.schema import ProcessorConfig
    from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor

    catalog.load()
    model = build_model(folder)
    image = make_image_processor(ProcessorConfig(name="blip2_image_eval"), ImageSpec(model.cfg.image_size))
    return Assistant(model, image, make_text_processor(ProcessorConfig()), "minigpt_v2")


def body(number: int, tokens: int) -> bytes:
    """A request about a picture of its own."""
    from PIL import Image

    image = Image.new("RGB", (224, 224), COLOURS[number % len(COLOURS)])
    image.paste("brown", (0, 0, 8 + 4 * number % 200, 100))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
    ]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": tokens}).encode()


def alone(assistant: Any, bodies: Sequence[bytes]) -> list[str]:
    """The answer of the model to every request on its own, without a server."""
    from minigpt4.serve.pictures import PictureLimits
    from minigpt4.serve.prompts import Preparer
    from minigpt4.serve.requests import Defaults, parse
    from minigpt4.tasks.answering import stacked

    preparer = Preparer(assistant, PictureLimits())
    wishes = [preparer(parse(one, Defaults())) for one in bodies]
    return [assistant.model.generate([wish.prompt], stacked(wish.images), wish.options)[0] for wish in wishes]


def load(assistant: Any, max_batch: int, clients: int, bodies: Sequence[bytes]) -> tuple[list[str], dict[str, float]]:
    """Answers in the order of ``bodies``, and the figures of one cell."""
    with serving(assistant, max_batch) as address:

        def ask(one: bytes) -> tuple[str, float, int]:
            begun = time.perf_counter()
            connection = HTTPConnection(*address)
            with contextlib.closing(connection):
                connection.request("POST", "/v1/chat/completions", one, {"Content-Type": "application/json"})
                reply = json.loads(connection.getresponse().read())
            seconds = time.perf_counter() - begun
            return reply["choices"][0]["message"]["content"], seconds, reply["usage"]["completion_tokens"]

        ask(bodies[0])
        begun, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(clients) as pool:
            results = list(pool.map(ask, bodies))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
    seconds = sorted(result[1] for result in results)
    return [result[0] for result in results], {
        "p50_s": statistics.median(seconds),
        "p95_s": seconds[min(int(len(seconds) * 0.95), len(seconds) - 1)],
        "requests_per_s": len(bodies) / wall,
        "tokens_per_s": sum(result[2] for result in results) / wall,
        "cpu_s_per_request": cpu / len(bodies),
    }


@contextlib.contextmanager
def serving(assistant: Any, max_batch: int) -> Iterator[tuple[str, int]]:
    """A server in a thread: host and port."""
    from minigpt4.serve.api import Settings
    from minigpt4.serve.pictures import PictureLimits
    from minigpt4.serve.scheduler import Limits
    from minigpt4.serve.server import Server, bind

    bound = bind("127.0.0.1", 0)
    server = Server(assistant, Limits(max_batch=max_batch), PictureLimits(), Settings("bench"))
    thread = threading.Thread(target=server.answer, args=(bound,))
    host, port = bound.getsockname()
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield host, port
    finally:
        server.should_exit = True
        thread.join()


def ratios(cells: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Batches on over off, per number of clients."""
    keys = ("p50_s", "p95_s", "requests_per_s", "cpu_s_per_request")
    return {str(n): {key: cells[f"{n} on"][key] / cells[f"{n} off"][key] for key in keys} for n in CLIENTS}


def report(figures: dict[str, Any]) -> None:
    """The figures as lines."""
    print(f"all answers are those of single requests ({figures['distinct']} distinct ones)")
    print(
        f"{'clients, batches':<17} {'p50 s':>8} {'p95 s':>8} {'requests/s':>11} {'tokens/s':>9} {'CPU-s/request':>14}"
    )
    for name, cell in figures["cells"].items():
        print(
            f"{name:<17} {cell['p50_s']:8.3f} {cell['p95_s']:8.3f} {cell['requests_per_s']:11.2f} "
            f"{cell['tokens_per_s']:9.1f} {cell['cpu_s_per_request']:14.3f}"
        )
    for clients, ratio in figures["ratios"].items():
        print(
            f"{clients} clients, batches on over off: throughput {ratio['requests_per_s']:.2f}, "
            f"p50 {ratio['p50_s']:.2f}, p95 {ratio['p95_s']:.2f}, CPU per request {ratio['cpu_s_per_request']:.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
