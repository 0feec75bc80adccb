"""Chat in the terminal: interactive, or ``--ask`` for scripts."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.chat.session import ChatSession
    from minigpt4.chat.transcript import Transcript
    from minigpt4.models.generation import GenerateOptions

COMMANDS = """/image PATH   a new picture, and a new conversation
/add PATH     one more picture, shown with the next question
/reset        a new conversation without a picture
/show         the pictures of this conversation again, in the terminal
/save FILE.md write the conversation as Markdown
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
    parser.add_argument(
        "--show-images",
        choices=("auto", "always", "never"),
        default="auto",
        help="pictures in the terminal: auto = where it can and the output is a terminal (default)",
    )
    parser.add_argument(
        "--boxes-dir",
        metavar="DIR",
        default="output/chat",
        help="where pictures with the boxes of answers go (default output/chat)",
    )
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
        "--no-merge", action="store_true", help="run LoRA beside the weights, as in training, not folded into them"
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
    add("--max-new-tokens", type=int, default=300, metavar="N", help="longest answer (default %(default)s)")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="shortest answer (default 0)")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="window of question and answer (default %(default)s; None = the model's)",
    )
    add("--num-beams", type=int, default=1, metavar="N", help="beam search width (default 1)")
    add("--length-penalty", type=float, default=1.0, metavar="L", help="beams: above 1 for longer answers (default 1)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 = the likeliest word (default %(default)s)",
    )
    add("--top-p", type=float, default=0.9, metavar="P", help="nucleus of sampling (default 0.9)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 stops loops (default %(default)s)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add(
        "--decoding", default="auto", metavar="HOW",
        help="dynamic, or compiled (a GPU's CUDA graph); auto (default) compiles on a GPU in long sessions",
    )  # fmt: skip


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
    from minigpt4.chat.terminal_image import choose_protocol
    from minigpt4.chat.transcript import Transcript

    options = generate_options(given)  # wrong flags and paths are told before weights load
    image = open_image(given.image) if given.image else None
    assistant = load_given(given, archs)
    session = ChatSession(assistant, lambda notice: print(f"note: {notice}", file=sys.stderr))
    wish = "never" if given.ask and given.show_images == "auto" else given.show_images  # answers alone, for scripts
    transcript = Transcript(choose_protocol(os.environ, sys.stdout.isatty(), wish), Path(given.boxes_dir))
    if image is not None:
        session.set_image(image)
        transcript.add_picture(given.image, image)
    if not given.ask:
        return interact(session, options, transcript)
    for question in given.ask:
        answer = session.ask(question, options)
        print(answer)
        if (drawn := transcript.add_answer(question, answer)) is not None:
            print(f"boxes: {drawn}", file=sys.stderr)
    return 0


def load_given(given: argparse.Namespace, archs: Sequence[str] = ()) -> Assistant:
    """The model that the flags of ``add_model_flags`` name. Raises as ``load_assistant`` does."""
    from minigpt4.chat.loading import LEGACY_TEMPLATE, choose_device, load_assistant

    settings = [*given.options, *([f"model.chat_format={LEGACY_TEMPLATE}"] if given.legacy_history else [])]
    return load_assistant(
        given.ckpt, given.cfg_path, settings, choose_device(given.gpu_id), archs, given.question_processor,
        merge_lora=not given.no_merge,
    )  # fmt: skip


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
        decoding=given.decoding,
    )


def interact(session: ChatSession, options: GenerateOptions, transcript: Transcript | None = None) -> int:
    """Read questions until ``quit`` or the end of input. What goes wrong with one question does not end the chat."""
    from minigpt4.chat.transcript import Transcript
    from minigpt4.common.errors import DataError, OutputError

    transcript = transcript or Transcript()
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
                _command(session, transcript, line)
            elif line:
                answer = _answer(session, line, options)
                if (drawn := transcript.add_answer(line, answer)) is not None:
                    print(f"boxes: {drawn}")
        except (DataError, OutputError) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:  # while a picture was read
            print("[stopped]")


def _command(session: ChatSession, transcript: Transcript, line: str) -> None:
    """Carry out ``/name argument``. Raises DataError for a picture that cannot be read, OutputError for a full disk."""
    from minigpt4.chat.session import open_image

    name, _, argument = line.partition(" ")
    path = argument.strip().strip("'\"")
    if name == "/image" and path:
        image = open_image(path)
        session.set_image(image)
        transcript.reset()
        transcript.add_picture(path, image)
        print("New picture, new conversation.")
    elif name == "/add" and path:
        image = open_image(path)
        session.add_image(image)
        transcript.add_picture(path, image)
        print("The next question shows this picture too.")
    elif name == "/reset":
        session.reset()
        transcript.reset()
        print("New conversation without a picture.")
    elif name == "/show":
        transcript.show_all()
    elif name == "/save" and path:
        print(f"saved: {transcript.save(path)}")
    else:
        print(COMMANDS)


def _answer(session: ChatSession, question: str, options: GenerateOptions) -> str:
    """Print an answer while it comes, and return it. Raises DataError for a question that cannot be asked."""
    pieces, read = session.stream(question, options), []
    print("MiniGPT-4: ", end="", flush=True)
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                read.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:  # stops this answer, not the chat
        print(" [stopped]", end="")
    print()
    return "".join(read)
