"""``demo_v2.py`` and ``demo.py``: flags, model, page."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.chat.command_line import add_decoding_flags, add_model_flags, generate_options, load_given
from minigpt4.common.errors import ConfigError

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.models.generation import GenerateOptions
    from minigpt4.web.limits import Limits
    from minigpt4.web.page import Page

LOOPBACK = ("127.0.0.1", "localhost", "::1")
AUTH_VARIABLE = "MINIGPT4_WEB_AUTH"


@dataclass(frozen=True)
class Demo:
    """One of the two programs. archs: model architectures it takes; empty = all."""

    prog: str
    title: str
    default_cfg_path: str = ""
    archs: tuple[str, ...] = ()
    is_v2: bool = True
    max_new_tokens: int = 500
    temperature: float = 0.6


V2 = Demo("demo_v2.py", "MiniGPT-v2", default_cfg_path="eval_configs/minigptv2_eval.yaml")
V1 = Demo("demo.py", "MiniGPT-4", archs=("minigpt4",), is_v2=False, max_new_tokens=300, temperature=1.0)


def build_parser(demo: Demo) -> argparse.ArgumentParser:
    """The flags of a demo; decoding starts where the published demo's did."""
    parser = argparse.ArgumentParser(
        prog=demo.prog,
        description=f"{demo.title} in the browser. Nothing leaves this machine unless you say so.",
        epilog="Limits, passwords and what differs from the published demos: docs/DEMOS.md",
    )
    add_model_flags(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    page.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860)")
    page.add_argument("--share", action="store_true", help="also a public link through gradio's servers")
    page.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help=f"ask for these; better in the variable {AUTH_VARIABLE}, which a process list does not show",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-megabytes", type=int, default=20, metavar="N", help="of a picture's file (default 20)")
    limits.add_argument("--max-megapixels", type=int, default=50, metavar="N", help="of a picture (default 50)")
    limits.add_argument("--max-characters", type=int, default=4000, metavar="N", help="of a question (default 4000)")
    limits.add_argument("--max-waiting", type=int, default=20, metavar="N", help="questions in the line (default 20)")
    limits.add_argument("--max-visits", type=int, default=50, metavar="N", help="conversations kept (default 50)")
    add_decoding_flags(parser)
    parser.set_defaults(
        max_new_tokens=demo.max_new_tokens, repetition_penalty=1.05, temperature=demo.temperature, max_length=2000
    )
    return parser


def main(argv: Sequence[str], demo: Demo) -> int:
    """Load the model and serve the page until Ctrl-C; returns the exit code. Raises MiniGPT4Error."""
    parser = build_parser(demo)
    given = parser.parse_args(argv)
    if given.ckpt is None and given.cfg_path is None:
        if not demo.default_cfg_path:
            parser.error("one of --ckpt and --cfg-path is required")
        given.cfg_path = demo.default_cfg_path
    auth = _auth(given.auth or os.environ.get(AUTH_VARIABLE, ""))  # wrong flags are told before weights load
    limits, port = _limits(given), free_port(given.host, given.port)
    options = generate_options(given)
    _prepare_gradio()

    from minigpt4 import catalog

    catalog.load()
    assistant = load_given(given, demo.archs)
    options = fitting(options, assistant)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: uploads are deleted then too
    with tempfile.TemporaryDirectory(prefix="minigpt4_web_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build_page(demo, assistant, Path(folder), limits, options)
        _warn(given, auth)
        serve(page, given.host, port, limits, auth, given.share)
    return 0


def build_page(demo: Demo, assistant: Assistant, folder: Path, limits: Limits, options: GenerateOptions) -> Page:
    """The page of a demo. folder: where pictures with boxes are written."""
    from minigpt4.web.page import Page, Style
    from minigpt4.web.visits import Visits

    visits = Visits(assistant, folder, limits, needs_picture=not demo.is_v2)
    examples = [("face_1.jpg", "Describe the person."), ("face_2.jpg", "What is the facial expression of the person?")]
    if demo.is_v2:
        examples.append(("faces.jpg", "[detection] face"))
    style = Style(
        title=demo.title,
        placeholder="Upload a picture and ask about it.",
        has_tasks=demo.is_v2,
        max_temperature=1.5 if demo.is_v2 else 2.0,
        max_beams=1 if demo.is_v2 else 10,
        examples=tuple(examples),
    )
    return Page(visits, style, options)


def serve(
    page: Page, host: str, port: int, limits: Limits, auth: tuple[str, str] | None, is_shared: bool, waits: bool = True
) -> str:
    """Open the page; returns its address. With ``waits`` it stays until Ctrl-C."""
    from minigpt4.web.page import EXAMPLES, HERE

    _, address, _ = page.blocks.launch(
        server_name=host,
        server_port=port,
        share=is_shared,
        auth=auth,
        max_file_size=f"{limits.max_megabytes}mb",
        max_threads=limits.max_waiting + 20,
        allowed_paths=[str(EXAMPLES)],
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        js=(HERE / "select_box.js").read_text(encoding="utf-8"),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    print(f"{page.style.title} answers at {address} (Ctrl-C ends it)", flush=True)
    if waits:
        page.blocks.block_thread()
    return str(address)


def fitting(options: GenerateOptions, assistant: Assistant) -> GenerateOptions:
    """The options within the model's window: half of it at most is for one answer."""
    window = assistant.model.context_window
    if window is None:
        return options
    longest = window if options.max_length is None else min(window, options.max_length)
    words = min(options.max_new_tokens, max(1, longest // 2))
    return replace(options, max_length=longest, max_new_tokens=words, min_new_tokens=min(words, options.min_new_tokens))


def _limits(given: argparse.Namespace) -> Limits:
    from minigpt4.web.limits import Limits

    return Limits(given.max_megabytes, given.max_megapixels, given.max_characters, given.max_waiting, given.max_visits)


def _auth(text: str) -> tuple[str, str] | None:
    user, colon, password = text.partition(":")
    if text and not (user and colon and password):
        raise ConfigError("--auth: expected USER:PASSWORD, both not empty")
    return (user, password) if text else None


def free_port(host: str, port: int | None) -> int:
    """``port``, or the first free one from 7860. Raises ConfigError when there is none."""
    ports = range(7860, 7960) if port is None else [port]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    refusal = "no port was tried"
    for number in ports:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number))
            except (OSError, OverflowError) as error:
                refusal = str(error)
                continue
            return number
    asked = "ports 7860 to 7959" if port is None else f"port {port}"
    raise ConfigError(f"cannot listen at {host}, {asked}: {refusal}")


def _prepare_gradio() -> None:
    """Settings that Gradio reads when it is imported: no usage reports, no look for newer versions."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the page needs gradio ({error}): pip install -e '.[web]'") from error


def _warn(given: argparse.Namespace, auth: tuple[str, str] | None) -> None:
    if auth is None and (given.share or given.host not in LOOPBACK):
        text = f"whoever reaches {given.host} can use this model; --auth USER:PASSWORD keeps others out"
        print(f"warning: {text}", file=sys.stderr)
