"""``minigpt4 serve``: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError

if TYPE_CHECKING:
    from minigpt4.serve.api import Settings
    from minigpt4.serve.pictures import PictureLimits
    from minigpt4.serve.scheduler import Limits

log = logging.getLogger(__name__)

KEY_VARIABLE = "MINIGPT4_API_KEY"
EXAMPLES = """\
examples:
  minigpt4 serve --ckpt output/my_faces
  minigpt4 serve --ckpt output/my_faces --port 8080 --image-root data/images --max-batch 16
  MINIGPT4_API_KEY=secret minigpt4 serve --cfg-path eval_configs/minigptv2_eval.yaml --host 0.0.0.0

Routes: POST /v1/chat/completions, GET /v1/models, GET /health. Ctrl-C or SIGTERM end it: running answers are finished
within --grace seconds, waiting requests are told 503. docs/SERVE.md has clients, limits and errors."""


def main(argv: Sequence[str]) -> int:
    """Serve one model until a signal comes; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    given = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from minigpt4 import catalog
    from minigpt4.chat.loading import choose_device, load_assistant
    from minigpt4.common.logger import setup_logging

    try:
        from minigpt4.serve.server import Server, bind
    except ImportError as error:
        raise ConfigError(
            f"minigpt4 serve needs fastapi and uvicorn: pip install 'minigptface[serve]' ({error})"
        ) from error

    setup_logging(is_main=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    limits, pictures = _limits(given), _picture_limits(given)  # wrong flags are told before weights load
    catalog.load()
    with bind(given.host, given.port) as bound:
        host, port = bound.getsockname()[:2]
        assistant = load_assistant(
            given.ckpt, given.cfg_path, given.options, choose_device(given.gpu_id), (), given.question_processor
        )
        settings = _settings(given, assistant.model.cfg.arch)
        if not settings.api_key and not ipaddress.ip_address(host).is_loopback:
            log.warning("everybody who reaches %s may ask: there is no --api-key", host)
        server = Server(assistant, limits, pictures, settings)
        address = f"[{host}]" if ":" in host else host
        log.info("%s answers at http://%s:%d/v1 on %s", settings.name, address, port, assistant.model.device)
        return server.answer(bound)


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 serve``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 serve",
        description="Answer questions about pictures over HTTP, for clients of OpenAI's chat completions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="checkpoint directory or job folder; needs nothing else")
    add("--cfg-path", metavar="FILE", help="YAML file of the model, for published weights")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    add("--gpu-id", type=int, default=0, metavar="N", help="which GPU (default 0; CPU where none is)")
    add(
        "--question-processor",
        default="auto",
        metavar="NAME",
        help="text processor of questions: auto = the checkpoint's (default), identity, blip_caption",
    )
    add("--name", metavar="NAME", help="of the model in requests and replies (default: its architecture)")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="port (default 8000; 0 = a free one)")
    add("--api-key", metavar="KEY", help=f"refuse requests without it (better: the variable {KEY_VARIABLE})")
    _add_answer_flags(parser)
    _add_limit_flags(parser)
    return parser


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("answers", "for requests that do not say it themselves").add_argument
    add("--max-tokens", type=int, default=300, metavar="N", help="longest answer (default 300)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 = the likeliest word (default)")
    add("--log-text", action="store_true", help="write questions and answers into the log")


def _add_limit_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits").add_argument
    add("--max-batch", type=int, default=8, metavar="N", help="requests answered at once (default 8; 1 = no batches)")
    add("--batch-wait", type=float, default=10, metavar="MS", help="how long a request waits for others (default 10)")
    add("--max-queue", type=int, default=64, metavar="N", help="waiting requests before 429 (default 64)")
    add(
        "--timeout", type=float, default=300, metavar="S", help="of a request, queue and answer (default 300), then 504"
    )
    add("--grace", type=float, default=20, metavar="S", help="for running answers when the server stops (default 20)")
    add("--max-body", type=float, default=32, metavar="MB", help="of a request (default 32), then 413")
    add("--max-image", type=float, default=16, metavar="MB", help="of a picture, as a file (default 16), then 413")
    add("--max-pixels", type=float, default=40, metavar="MP", help="megapixels of a picture (default 40), then 413")
    add("--image-root", metavar="DIR", help="folder that requests may name pictures of (default: none)")


def _limits(given: argparse.Namespace) -> Limits:
    from minigpt4.serve.scheduler import Limits

    for name in ("max_batch", "max_queue", "timeout", "max_body", "max_image", "max_pixels", "max_tokens"):
        if not getattr(given, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be > 0, got {getattr(given, name)}")
    for name in ("batch_wait", "grace"):
        if not getattr(given, name) >= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be >= 0, got {getattr(given, name)}")
    if not 0 <= given.temperature <= 2:
        raise ConfigError(f"--temperature must be from 0 to 2, got {given.temperature}")
    return Limits(given.max_batch, given.max_queue, given.batch_wait / 1000, given.timeout, given.grace)


def _picture_limits(given: argparse.Namespace) -> PictureLimits:
    from minigpt4.serve.pictures import PictureLimits

    root = None
    if given.image_root is not None:
        root = Path(given.image_root).expanduser().resolve()
        if not root.is_dir():
            raise ConfigError(f"--image-root {given.image_root}: no such folder")
    return PictureLimits(root, int(given.max_image * 1e6), int(given.max_pixels * 1e6))


def _settings(given: argparse.Namespace, arch: str) -> Settings:
    from minigpt4.serve.api import Settings
    from minigpt4.serve.requests import Defaults

    return Settings(
        name=given.name or arch,
        api_key=given.api_key or os.environ.get(KEY_VARIABLE, ""),
        max_body=int(given.max_body * 1e6),
        defaults=Defaults(given.max_tokens, given.temperature),
        logs_text=given.log_text,
    )
