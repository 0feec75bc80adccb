"""Chat in the terminal: interactive, or ``--ask`` for scripts."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minigpt4.chat.session import ChatSession
    from minigpt4.models.generation import GenerateOptions

COMMANDS = """/image PATH   a new picture, and a new conversation
/reset        a new conversation without a picture
/help         these lines
/quit         leave (also: quit, Ctrl-D)"""


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The flags of ``minigpt4 chat`` and of the two demo programs."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Talk to a model about an image. Without --ask the chat is interactive.",
        epilog="In the chat:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt", metavar="DIR", help="checkpoint directory or job folder; needs nothing else")
    parser.add_argument("--cfg-path", metavar="FILE", help="YAML file of the model, for published weights")
    parser.add_argument("--image", metavar="FILE", help="picture to talk about")
    parser.add_argument("--ask", metavar="QUESTION", action="append", default=[], help="ask, print, leave; repeatable")
    parser.add_argument("--gpu-id", type=int, default=0, metavar="N", help="which GPU (default 0; CPU where none is)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument("--max-new-tokens", type=int, default=300, metavar="N", help="longest answer (default 300)")
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search width (default 1)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 = always the likeliest word (default); 0.6 varies",
    )
    parser.add_argument("--top-p", type=float, default=0.9, metavar="P", help="nucleus of sampling (default 0.9)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="default 1.0 = none")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="makes sampling repeatable")
    parser.add_argument(
        "--question-processor",
        default="auto",
        metavar="NAME",
        help="text processor of questions: auto = the checkpoint's (default), identity, blip_caption",
    )
    return parser


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The given flags; prints help or a usage error and leaves where argparse does."""
    parser = build_parser(prog)
    given = parser.parse_args(argv)
    if given.ckpt is None and given.cfg_path is None:
        parser.error("one of --ckpt and --cfg-path is required")
    return given


def run(given: argparse.Namespace, archs: Sequence[str] = ()) -> int:
    """Run the chat; returns the exit code. Names must be registered. Raises MiniGPT4Error for mistakes of the user."""
    from minigpt4.chat.loading import choose_device, load_assistant
    from minigpt4.chat.session import ChatSession, open_image
    from minigpt4.models.generation import GenerateOptions

    image = open_image(given.image) if given.image else None  # a wrong path is told before weights load
    assistant = load_assistant(
        given.ckpt, given.cfg_path, given.options, choose_device(given.gpu_id), archs, given.question_processor
    )
    session = ChatSession(assistant)
    if image is not None:
        session.set_image(image)
    options = GenerateOptions(
        max_new_tokens=given.max_new_tokens,
        num_beams=given.num_beams,
        do_sample=given.temperature > 0,
        temperature=given.temperature or 1.0,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        seed=given.seed,
    )
    if given.ask:
        for question in given.ask:
            print(session.ask(question, options))
        return 0
    return interact(session, options)


def interact(session: ChatSession, options: GenerateOptions) -> int:
    """Read questions until ``quit`` or the end of input."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys in input())
        print("Ask about the picture. /help lists the commands, /quit leaves.")
    while True:
        try:
            line = input("User: ").strip()
        except EOFError:
            print()
            return 0
        if line.lower() in ("quit", "/quit", "exit", "/exit"):
            return 0
        if line.startswith("/"):
            _command(session, line)
        elif line:
            _answer(session, line, options)


def _command(session: ChatSession, line: str) -> None:
    from minigpt4.chat.session import open_image
    from minigpt4.common.errors import DataError

    name, _, argument = line.partition(" ")
    if name == "/image" and argument.strip():
        try:
            session.set_image(open_image(argument.strip().strip("'\"")))
            print("New picture, new conversation.")
        except DataError as error:
            print(f"error: {error}")
    elif name == "/reset":
        session.reset()
        print("New conversation without a picture.")
    else:
        print(COMMANDS)


def _answer(session: ChatSession, question: str, options: GenerateOptions) -> None:
    print("MiniGPT-4: ", end="", flush=True)
    try:
        pieces = session.stream(question, options) if options.num_beams == 1 else iter([session.ask(question, options)])
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # stops this answer, not the chat
        print(" [stopped]", end="")
    print()
