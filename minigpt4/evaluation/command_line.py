"""What ``eval_scripts/eval_ref.py`` and ``eval_vqa.py`` do, with the flags of the published scripts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common.errors import ConfigError, nearest

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.common.dist import DistContext
    from minigpt4.common.schema import Config
    from minigpt4.evaluation.blocks import Block
    from minigpt4.evaluation.engine import AnswerOptions
    from minigpt4.evaluation.questions import Question
    from minigpt4.evaluation.results import Result

REFER = ("refcoco", "refcoco+", "refcocog")
VQA = ("okvqa", "vizwiz", "iconvqa", "gqa", "vsr", "hm")


@dataclass(frozen=True)
class Job:
    """One table row to be: questions that are read, and what answers and scores them."""

    block: Block
    questions: Sequence[Question]
    run: Callable[[Assistant, Path, AnswerOptions, DistContext], Result]


def eval_ref(argv: Sequence[str]) -> int:
    """Referring expressions; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    parser = build_parser("eval_ref.py", "Score a model on RefCOCO, RefCOCO+ and RefCOCOg.", REFER, "refcoco")
    parser.add_argument("--res", type=float, default=100.0, metavar="N", help="what a full side is in answers (100)")
    parser.add_argument("--resample", action="store_true", help="ask again, up to 5 times, where no box was answered")
    parser.add_argument(
        "--legacy-resample",
        action="store_true",
        help="ask again as the published script did: greedy, the phrase written as a Python list",
    )
    parser.add_argument("--split", default="", metavar="A,B", help="val, testA, testB or test (default: all of a set)")
    given = parser.parse_args(argv)
    wanted = [name.strip() for name in given.split.split(",") if name.strip()]

    def jobs(block: Block) -> list[Job]:
        from minigpt4.evaluation.refer import SPLITS, Retries, evaluate_refer, refer_questions

        known = list(SPLITS[block.name])
        for split in wanted:
            if split not in known:
                raise ConfigError(f"--split: '{split}' is none of {block.name}'s: {', '.join(known)}")

        retries = Retries(given.resample or given.legacy_resample, given.legacy_resample)

        def job(split: str) -> Job:
            name, questions = f"{block.name}_{split}", refer_questions(block, split)
            return Job(
                block,
                questions,
                lambda assistant, folder, options, dist: evaluate_refer(
                    assistant, name, questions, folder, options, retries, dist, given.res
                ),
            )

        return [job(split) for split in wanted or known]

    return _evaluate(given, REFER, jobs)


def eval_vqa(argv: Sequence[str]) -> int:
    """Questions with short answers; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    description = "Score a model on OK-VQA, VizWiz, IconQA, GQA, VSR and Hateful Memes."
    given = build_parser("eval_vqa.py", description, VQA, "").parse_args(argv)

    def jobs(block: Block) -> list[Job]:
        from minigpt4.evaluation.vqa import evaluate_vqa, read_questions

        questions = read_questions(block)
        return [
            Job(
                block,
                questions,
                lambda assistant, folder, options, dist: evaluate_vqa(
                    assistant, block, questions, folder, options, dist
                ),
            )
        ]

    return _evaluate(given, VQA, jobs)


def build_parser(prog: str, description: str, known: Sequence[str], default: str) -> argparse.ArgumentParser:
    """Flags of both scripts. ``default``: the data sets where none are named; '' = they must be named."""
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog="See eval_scripts/EVAL_README.md.")
    add = parser.add_argument
    add("--cfg-path", required=True, metavar="FILE", help="YAML with model, run and evaluation_datasets")
    told = f"(default {default})" if default else "(required)"
    add(
        "--dataset",
        default=default,
        required=not default,
        metavar="A,B",
        help=f"names, comma separated {told}: {', '.join(known)}",
    )
    add("--ckpt", metavar="PATH", help="checkpoint or job folder, or a .pth, in place of the YAML's model.ckpt")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    add("--name", default="", metavar="LABEL", help="label in results.json (default: run.name)")
    add("--max_new_tokens", type=int, metavar="N", help="over that of every data set")
    add("--batch_size", type=int, metavar="N", help="over that of every data set")
    add("--lora_r", type=int, metavar="R", help="the same as --options model.lora_r=R")
    add("--lora_alpha", type=int, metavar="A", help="the same as --options model.lora_alpha=A")
    add("--eval_opt", default="all", metavar="X", help="accepted, means nothing")
    add("--overwrite", action="store_true", help="ask everything again, whatever answers are in run.save_path")
    return parser


def _evaluate(given: argparse.Namespace, known: Sequence[str], jobs_of: Callable[[Block], list[Job]]) -> int:
    """Read and check everything, load the model once, run all jobs, show and keep the scores."""
    from minigpt4 import catalog
    from minigpt4.common import dist
    from minigpt4.common.config import load_config
    from minigpt4.common.logger import console, setup_logging
    from minigpt4.common.schema import RunConfig
    from minigpt4.evaluation.identity import model_identity
    from minigpt4.evaluation.results import keep_results, show_results

    catalog.load()
    context = dist.init(RunConfig())
    try:
        setup_logging(context.is_main)
        ckpt, settings = _weights(given)
        cfg = load_config(given.cfg_path, settings, check_data=False)
        jobs = [job for block in _blocks(given, cfg, known) for job in jobs_of(block)]
        about = model_identity(ckpt, given.cfg_path, settings)
        folder = Path(cfg.run.save_path or Path(cfg.run.output_dir) / "evaluation").expanduser()
        results = _run(jobs, (ckpt, given.cfg_path, settings), folder, about, given.overwrite, context)
        if context.is_main:
            label = given.name or cfg.run.name
            keep_results(folder, results, about | ({"name": label} if label else {}))
            show_results(results, console)
            for result in results:
                print(f"{result.name.replace('_', ' ')}: {result.score:.2f}")
    finally:
        context.close()
    return 0


def _run(
    jobs: Sequence[Job],
    model: tuple[str | None, str, Sequence[str]],
    folder: Path,
    about: dict[str, str],
    is_overwriting: bool,
    context: DistContext,
) -> list[Result]:
    from minigpt4.chat.loading import load_assistant
    from minigpt4.evaluation.engine import AnswerOptions
    from minigpt4.models.generation import GenerateOptions

    ckpt, cfg_path, settings = model
    folder.mkdir(parents=True, exist_ok=True)
    assistant = load_assistant(ckpt, cfg_path, settings, context.device)
    results = []
    for job in jobs:
        generation = GenerateOptions(max_new_tokens=job.block.max_new_tokens)
        options = AnswerOptions(generation, job.block.batch_size, about, is_overwriting, job.block.name)
        results.append(job.run(assistant, folder, options, context))
    return results


def _weights(given: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The checkpoint folder to load, if any, and the settings over the YAML's."""
    settings = list(given.options)
    flags: dict[str, Any] = {"model.lora_r": given.lora_r, "model.lora_alpha": given.lora_alpha}
    ckpt: str | None = given.ckpt
    if ckpt and Path(ckpt).is_file():
        flags["model.ckpt"], ckpt = Path(ckpt).absolute(), None
    added = [(key, value) for key, value in flags.items() if value is not None]
    is_paired = not settings or "=" in settings[0]  # --options takes one of two forms throughout
    settings += [f"{key}={value}" for key, value in added] if is_paired else [str(x) for pair in added for x in pair]
    return ckpt, settings


def _blocks(given: argparse.Namespace, cfg: Config, known: Sequence[str]) -> list[Block]:
    from minigpt4.evaluation.blocks import read_block

    names = list(dict.fromkeys(name.strip() for name in given.dataset.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--dataset names nothing; known: {', '.join(known)}")
    for name in names:
        if name not in known:
            script = "; eval_ref.py scores it" if name in REFER else "; eval_vqa.py scores it" if name in VQA else ""
            raise ConfigError(f"--dataset: unknown '{name}'{nearest(name, known)}; known: {', '.join(known)}{script}")
    flags = {"max_new_tokens": given.max_new_tokens, "batch_size": given.batch_size}
    changes = {key: value for key, value in flags.items() if value is not None}
    return [read_block(name, cfg.evaluation_datasets, Path(given.cfg_path), changes) for name in names]
