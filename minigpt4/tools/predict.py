"""``minigpt4 predict``: answers to questions about many pictures, in a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError

if TYPE_CHECKING:
    from minigpt4.common.dist import DistContext
    from minigpt4.evaluation.engine import AnswerOptions
    from minigpt4.evaluation.questions import Question

EXAMPLES = """\
examples:
  minigpt4 predict --ckpt output/my_faces --images faces --question "What is the emotion?" --out p.jsonl
  minigpt4 predict --ckpt output/my_faces --questions asked.jsonl --images faces --out p.jsonl --max-new-tokens 20
  torchrun --nproc-per-node 4 -m minigpt4 predict --ckpt output/my_faces --questions asked.csv --out p.jsonl

A record of --questions holds question, image or images (files below --images, else beside the file) and id; JSON, JSON
lines, CSV and Parquet are read. A line of --out holds id, images, question, answer, error where there is no answer, and
meta, the other fields of the record. The same command again goes on where it was cut off, asks what failed before, and
what is new; answers of other weights or settings are never mixed with."""


def main(argv: Sequence[str]) -> int:
    """Answer all questions; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    given = build_parser().parse_args(argv)
    questions = _questions(given)  # told before anything heavy is imported

    from minigpt4 import catalog
    from minigpt4.common import dist
    from minigpt4.common.logger import setup_logging
    from minigpt4.common.schema import RunConfig
    from minigpt4.evaluation.identity import model_identity

    catalog.load()
    options = _options(given).based_on(
        model_identity(given.ckpt, given.cfg_path, given.options, given.question_processor)
    )
    context = dist.init(RunConfig())
    try:
        setup_logging(context.is_main)
        options.ledger(Path(given.out), questions).check(context)
        return _answer(given, questions, options, context)
    finally:
        context.close()


def _answer(
    given: argparse.Namespace, questions: Sequence[Question], options: AnswerOptions, context: DistContext
) -> int:
    from minigpt4.chat.loading import choose_device, load_assistant
    from minigpt4.evaluation.engine import answer_all

    device = choose_device(given.gpu_id) if context.world_size == 1 else context.device
    assistant = load_assistant(
        given.ckpt, given.cfg_path, given.options, device, question_processor=given.question_processor
    )
    answers = answer_all(assistant, questions, Path(given.out), options, context)
    failed = sum(bool(answer.error) for answer in answers)
    if context.is_main:
        told = f"; {failed} of them have none, see their field 'error'" if failed else ""
        print(f"{len(answers)} answers in {given.out}{told}")
    return 1 if failed == len(answers) else 0


def _options(given: argparse.Namespace) -> AnswerOptions:
    from minigpt4.chat.command_line import generate_options
    from minigpt4.evaluation.engine import AnswerOptions

    size = None
    if given.batch_size != "auto":
        if not given.batch_size.isdecimal():
            raise ConfigError(f"--batch-size must be auto or a whole number, got '{given.batch_size}'")
        size = int(given.batch_size)
    return AnswerOptions(generate_options(given), size, is_overwriting=given.overwrite, title="answers")


def _questions(given: argparse.Namespace) -> list[Question]:
    from minigpt4.evaluation.questions import questions_of_file, questions_of_folder

    if bool(given.question) == bool(given.questions):
        raise ConfigError("write either --question (repeatable), asked about every picture of --images, or --questions")
    images = None if given.images is None else Path(given.images).expanduser()
    if images is not None and not images.is_dir():
        raise ConfigError(f"--images '{given.images}': no such folder")
    if given.questions:
        return questions_of_file(Path(given.questions).expanduser(), images)
    if images is None:
        raise ConfigError("--question needs --images, the folder of pictures it is asked about")
    return questions_of_folder(images, given.question)


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 predict``."""
    from minigpt4.chat.command_line import add_decoding_flags

    parser = argparse.ArgumentParser(
        prog="minigpt4 predict",
        description="Answer questions about many pictures in batches, each in a conversation of its own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="checkpoint directory or job folder; needs nothing else")
    add("--cfg-path", metavar="FILE", help="YAML file of the model, for published weights")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    add("--images", metavar="DIR", help="folder of pictures, searched with its sub-folders")
    add("--question", action="append", default=[], metavar="TEXT", help="asked about every picture; repeatable")
    add("--questions", metavar="FILE", help="a file of questions and their pictures, see below")
    add("--out", required=True, metavar="FILE", help="JSON lines, in the order of the questions")
    add("--overwrite", action="store_true", help="begin anew whatever is in --out")
    add("--batch-size", default="auto", metavar="N", help="questions at once; auto = as many as fit (default)")
    add("--gpu-id", type=int, default=0, metavar="N", help="which GPU (default 0; CPU where none is)")
    add(
        "--question-processor",
        default="auto",
        metavar="NAME",
        help="text processor of questions: auto = the checkpoint's (default), identity, blip_caption",
    )
    add_decoding_flags(parser)
    return parser
