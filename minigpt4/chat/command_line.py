"""Chat in the terminal: interactive, or ``--ask`` for scripts."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.chat.session import ChatSession
    from minigpt4.models.generation import GenerateOptions

COMMANDS = """/image PATH   a new picture, and a new conversation
/add PATH     one more picture, shown with the next question
/reset        a new conversation without a picture
/help         these lines
/quit         leave (also: quit, Ctrl-D)
Ctrl-C stops an answer; what was said of it stays in the conversation."""


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The flags of ``minigpt4 chat`` and of the two demo programs."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Talk to a model about an image. Without --ask the chat is interactive.",
        epilog="In the chat:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", metavar="FILE", help="picture to talk about")
    parser.add_argument("--ask", metavar="QUESTION", action="append", default=[], help="ask, print, leave; repeatable")
    add_model_flags(parser)
    add_decoding_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model answers, and how it is asked; all chat programs have them."""
    parser.add_argument("--ckpt", metavar="DIR", help="checkpoint directory or job folder; needs nothing else")
    parser.add_argument("--cfg-path", metavar="FILE", help="YAML file of the model, for published weights")
    parser.add_argument("--gpu-id", type=int, default=0, metavar="N", help="which GPU (default 0; CPU where none is)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument(
        "--question-processor",
        default="auto",
        metavar="NAME",
        help="text processor of questions: auto = the checkpoint's (default), identity, blip_caption",
    )
    parser.add_argument(
        "--legacy-history",
        action="store_true",
        help="MiniGPT-v2: write the conversation as the published chat did, without end symbols between turns",
    )


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``generate_options``."""
    decoding = parser.add_argument_group("answers", "The published demos sampled: --temperature 1")
    add = decoding.add_argument
    add("--max-new-tokens", type=int, default=300, metavar="N", help="longest answer (default 300)")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="shortest answer (default 0)")
    add("--max-length", type=int, metavar="N", help="window of question and answer (default: the model's own)")
    add("--num-beams", type=int, default=1, metavar="N", help="beam search width (default 1)")
    add("--length-penalty", type=float, default=1.0, metavar="L", help="beams: above 1 for longer answers (default 1)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 = the likeliest word (default); 0.6 varies")
    add("--top-p", type=float, default=0.9, metavar="P", help="nucleus of sampling (default 0.9)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 against loops (default 1 = none)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The given flags; prints help or a usage error and leaves where argparse does."""
    parser = build_parser(prog)
    given = parser.parse_args(argv)
    if given.ckpt is None and given.cfg_path is None:
        parser.error("one of --ckpt and --cfg-path is required")
    return given


def run(given: argparse.Namespace, archs: Sequence[str] = ()) -> int:
    """Run the chat; returns the exit code. Names must be registered. Raises MiniGPT4Error for mistakes of the user."""
    from minigpt4.chat.session import ChatSession, open_image

    options = generate_options(given)  # wrong flags and paths are told before weights load
    image = open_image(given.image) if given.image else None
    assistant = load_given(given, archs)
    session = ChatSession(assistant, lambda notice: print(f"note: {notice}", file=sys.stderr))
    if image is not None:
        session.set_image(image)
    if given.ask:
        for question in given.ask:
            print(session.ask(question, options))
        return 0
    return interact(session, options)


def load_given(given: argparse.Namespace, archs: Sequence[str] = ()) -> Assistant:
    """The model that the flags of ``add_model_flags`` name. Raises as ``load_assistant`` does."""
    from minigpt4.chat.loading import LEGACY_TEMPLATE, choose_device, load_assistant

    settings = [*given.options, *([f"model.chat_format={LEGACY_TEMPLATE}"] if given.legacy_history else [])]
    return load_assistant(
        given.ckpt, given.cfg_path, settings, choose_device(given.gpu_id), archs, given.question_processor
    )


def generate_options(given: argparse.Namespace) -> GenerateOptions:
    """How answers are decoded, by the flags. Raises ConfigError for values that make no sense."""
    from minigpt4.models.generation import GenerateOptions

    return GenerateOptions(
        max_new_tokens=given.max_new_tokens,
        num_beams=given.num_beams,
        do_sample=given.temperature != 0,
        temperature=given.temperature or 1.0,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        length_penalty=given.length_penalty,
        min_new_tokens=given.min_new_tokens,
        max_length=given.max_length,
        seed=given.seed,
    )


def interact(session: ChatSession, options: GenerateOptions) -> int:
    """Read questions until ``quit`` or the end of input. What goes wrong with one question does not end the chat."""
    from minigpt4.common.errors import DataError

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
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves.")
            continue
        if line.lower() in ("quit", "/quit", "exit", "/exit"):
            return 0
        try:
            if line.startswith("/"):
                _command(session, line)
            elif line:
                _answer(session, line, options)
        except DataError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:  # while a picture was read
            print("[stopped]")


def _command(session: ChatSession, line: str) -> None:
    """Carry out ``/name argument``. Raises DataError for a picture that cannot be read."""
    from minigpt4.chat.session import open_image

    name, _, argument = line.partition(" ")
    path = argument.strip().strip("'\"")
    if name == "/image" and path:
        session.set_image(open_image(path))
        print("New picture, new conversation.")
    elif name == "/add" and path:
        session.add_image(open_image(path))
        print("The next question shows this picture too.")
    elif name == "/reset":
        session.reset()
        print("New conversation without a picture.")
    else:
        print(COMMANDS)


def _answer(session: ChatSession, question: str, options: GenerateOptions) -> None:
    """Print an answer while it comes. Raises DataError for a question that cannot be asked."""
    pieces = session.stream(question, options)
    print("MiniGPT-4: ", end="", flush=True)
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:  # stops this answer, not the chat
        print(" [stopped]", end="")
    print()
