"""Command line: ``minigpt4 train | chat | serve | predict | ls | cp | export | ...``. Heavy imports are late."""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

TOOLS = {
    "predict": ("minigpt4.tools.predict", "answer questions about many pictures, into a JSON lines file"),
    "ls": ("minigpt4.tools.listing", "list the names that a YAML file may use"),
    "cp": ("minigpt4.tools.copying", "copy a shipped YAML file or the card of a data set, to edit"),
    "doctor": ("minigpt4.tools.doctor.command", "look at all data of a YAML file before training"),
    "report": ("minigpt4.tools.report", "write one page about a run, or about two side by side"),
    "export": ("minigpt4.tools.export", "write a trained model for other programs, and check it"),
    "serve": ("minigpt4.serve.command", "answer over HTTP, for clients of OpenAI's chat completions"),
    "plan": ("minigpt4.tools.plan", "predict the GPU memory of a run, and propose what makes it fit"),
    "cache": ("minigpt4.tools.vision_cache", "fill, check or empty the cache of frozen vision features"),
    "env": ("minigpt4.tools.environment", "print versions and hardware for a bug report"),
}
"""Command -> module with a ``main(arguments)``, and its line in --help."""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``train.py``, the same ones as in MiniGPT-4."""
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help="YAML file with model, datasets and run")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's: run.init_lr=1e-5"
    )
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on from a checkpoint or job folder; auto = newest job of this name"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show data, batch, parameters and one example per data set; no weights are read, nothing is trained",
    )


def train(cfg_path: str, options: Sequence[str] = (), resume: str | None = None, is_dry: bool = False) -> int:
    """Run one training on this rank; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    # must be set before CUDA is initialised: rows differ in length, and fixed segments would fragment the memory
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked

    from minigpt4 import catalog
    from minigpt4.common import dist
    from minigpt4.common.config import load_config
    from minigpt4.common.logger import setup_logging
    from minigpt4.common.registry import registry

    setup_logging(is_main=int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0)
    catalog.load()
    overrides = [*options, *([] if resume is None else [f"run.resume_ckpt_path={resume}"])]
    cfg = load_config(cfg_path, overrides)
    if not cfg.run.job_name:
        cfg = replace(cfg, run=replace(cfg.run, job_name=Path(cfg_path).stem))
    context = dist.single(cfg.run.device) if is_dry else dist.init(cfg.run)
    try:
        with context.naming_lost_ranks():
            if cfg.run.recompute == "auto":
                from minigpt4.tools.planner.choice import settle_recompute

                cfg = settle_recompute(cfg, context)
            if is_dry:
                from minigpt4.runners.dry_run import dry_run

                return dry_run(cfg)
            runner = registry.get("runner", cfg.run.runner)(cfg, context)
            begun = copy.copy(runner.progress)
            code: int = runner.train()
        if context.is_main and cfg.run.report and runner.progress != begun:
            from minigpt4.report.write import write_after_training

            write_after_training(runner.job_dir)
    finally:
        context.close()
    return code


def train_command(arguments: Sequence[str]) -> int:
    """What ``train.py`` does with its arguments; returns the exit code."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a model described by a YAML file.")
    add_train_arguments(parser)
    given = parser.parse_args(arguments)
    return report_errors(lambda: train(given.cfg_path, given.options, given.resume, given.dry_run))


def report_errors(action: Callable[[], int]) -> int:
    """The exit code of ``action``; a user's mistake is printed line by line, without a traceback, and gives 2."""
    from minigpt4.common.errors import MiniGPT4Error

    try:
        return action()
    except MiniGPT4Error as error:
        rank = f"[rank {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        for line in str(error).splitlines():
            print(f"{rank}error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``minigpt4`` command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["chat"]:  # this and the tools read their own flags, --help included
        return chat_command(arguments[1:])
    if arguments and arguments[0] in TOOLS:
        return report_errors(lambda: tool(arguments[0], arguments[1:]))
    parser = argparse.ArgumentParser(prog="minigpt4", description="Fine-tune and try vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_train_arguments(commands.add_parser("train", help="train a model described by a YAML file"))
    commands.add_parser("chat", help="talk to a model about images")
    for name, (_, summary) in TOOLS.items():
        commands.add_parser(name, help=summary)
    given = parser.parse_args(arguments)
    return report_errors(lambda: train(given.cfg_path, given.options, given.resume, given.dry_run))


def tool(name: str, arguments: Sequence[str]) -> int:
    """Run one of TOOLS; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    code: int = importlib.import_module(TOOLS[name][0]).main(arguments)
    return code


def chat_command(arguments: Sequence[str], prog: str = "minigpt4 chat", archs: Sequence[str] = ()) -> int:
    """What the chat programs do with their arguments; returns the exit code."""
    from minigpt4.chat import command_line

    given = command_line.parse(arguments, prog)

    def chat() -> int:
        from minigpt4 import catalog

        catalog.load()
        return command_line.run(given, archs)

    return report_errors(chat)


if __name__ == "__main__":
    sys.exit(main())
