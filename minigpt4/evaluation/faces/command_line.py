"""What ``eval_scripts/eval_faces.py`` does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError

if TYPE_CHECKING:
    from minigpt4.common.dist import DistContext
    from minigpt4.evaluation.engine import AnswerOptions
    from minigpt4.evaluation.faces.cases import FaceSet
    from minigpt4.evaluation.faces.run import FaceEvaluation, Wishes

EXAMPLES = """\
examples:
  eval_faces.py --ckpt output/my_faces --dataset rafdb --data-root /data/RAF-DB --mode both --out scores/rafdb
  eval_faces.py --ckpt output/my_faces --dataset own --annotations test.csv --data-root images \\
      --question "What is the emotion?" --by skin_type gender --out scores/test
  torchrun --nproc-per-node 4 eval_scripts/eval_faces.py ... --compare scores/older_model

Layouts, scores and their meaning: eval_scripts/FACES_README.md. The same command again goes on where it was cut off."""


def eval_faces(argv: Sequence[str]) -> int:
    """Score a model on one face data set; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    given = build_parser().parse_args(argv)

    from minigpt4 import catalog
    from minigpt4.common import dist
    from minigpt4.common.logger import setup_logging
    from minigpt4.common.schema import RunConfig
    from minigpt4.evaluation.faces.run import FaceEvaluation
    from minigpt4.evaluation.identity import model_identity

    catalog.load()
    context = dist.init(RunConfig())
    try:
        setup_logging(context.is_main)
        wishes, options = _wishes(given), _options(given)
        identity = model_identity(given.ckpt, given.cfg_path, given.options, given.question_processor)
        faces = _read(given, context)
        evaluation = FaceEvaluation(faces, wishes, Path(given.out), options.based_on(identity))
        evaluation.check(context)
        return _score(given, evaluation, context)
    finally:
        context.close()


def _score(given: argparse.Namespace, evaluation: FaceEvaluation, context: DistContext) -> int:
    from minigpt4.chat.loading import choose_device, load_assistant
    from minigpt4.common.logger import console
    from minigpt4.evaluation.faces.compare import differences, read_predictions
    from minigpt4.evaluation.faces.tables import show_differences, show_results

    modes = evaluation.wishes.modes
    others = {mode: read_predictions(Path(given.compare), mode) for mode in modes} if given.compare else {}
    device = choose_device(given.gpu_id) if context.world_size == 1 else context.device
    assistant = load_assistant(
        given.ckpt, given.cfg_path, given.options, device, question_processor=given.question_processor
    )
    results = evaluation.run(assistant, context)
    scored = sum(scores["n"] for found in results["modes"].values() for scores in found["sections"].values())
    if context.is_main:
        show_results(results, console)
        for mode, other in others.items():
            show_differences(mode, differences(read_predictions(evaluation.out, mode), other), console)
        console.print(f"Scores and answers: {evaluation.out}", highlight=False)
    return 0 if scored else 1


def _read(given: argparse.Namespace, context: DistContext) -> FaceSet:
    from minigpt4.common.registry import registry
    from minigpt4.evaluation.faces.cases import Source
    from minigpt4.evaluation.ledger import on_main

    fields = dict(item.partition("=")[::2] for item in given.fields)
    if not all(fields.values()):
        raise ConfigError(f"--fields takes NAME=COLUMN, got: {' '.join(given.fields)}")
    read = registry.get("face_set", given.dataset)
    source = Source(
        root=Path(given.data_root).expanduser(),
        split=given.split,
        sections=tuple(given.sections),
        cache=Path(given.out) / "pictures",
        annotations=Path(given.annotations).expanduser() if given.annotations else None,
        fields=fields,
        question=given.question,
        label_set=given.label_set,
    )
    faces: FaceSet = on_main(context, lambda: read(source).limited(given.limit, given.seed))
    if given.question and given.dataset != "own":
        cases = tuple(replace(case, question=given.question) for case in faces.cases)
        faces = replace(faces, cases=cases)
    return faces


def _wishes(given: argparse.Namespace) -> Wishes:
    from minigpt4.evaluation.faces.run import GENERATE, LIKELIHOOD, Wishes

    return Wishes(
        modes=(GENERATE, LIKELIHOOD) if given.mode == "both" else (given.mode,),
        shows_options={"auto": None, "options": True, "plain": False}[given.prompt],
        permutations=given.permutations,
        seed=given.seed,
        with_blank=not given.no_blank,
        by=tuple(given.by) if given.by is not None else None,
        min_group=given.min_group,
    )


def _options(given: argparse.Namespace) -> AnswerOptions:
    from minigpt4.evaluation.engine import AnswerOptions
    from minigpt4.models.generation import GenerateOptions

    generation = GenerateOptions(max_new_tokens=given.max_new_tokens)
    return AnswerOptions(generation, given.batch_size, is_overwriting=given.overwrite)


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``eval_faces.py``."""
    parser = argparse.ArgumentParser(
        prog="eval_faces.py",
        description="Score a model on a face data set: labels, ordered labels, multiple choice and texts, with "
        "intervals, baselines and groups of people.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="checkpoint directory or job folder; needs nothing else")
    add("--cfg-path", metavar="FILE", help="YAML file of the model, for published weights")
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    add("--dataset", required=True, metavar="NAME", help="minigpt4 ls face_set lists them; own = your own file")
    add("--data-root", required=True, metavar="DIR", help="folder of the data set; own: of the pictures")
    add("--annotations", metavar="FILE", help="annotation file, where it is not at its usual place")
    add("--split", default="", metavar="NAME", help="default: the one that papers report on")
    add("--sections", nargs="+", default=[], metavar="NAME", help="tasks or sections (default: the data set's own)")
    add("--question", default="", metavar="TEXT", help="asked in place of the data set's question")
    add(
        "--fields", nargs="+", default=[], metavar="NAME=COLUMN", help="own: columns of image, label, question, section"
    )
    add("--label-set", default="", metavar="NAME", help="own: a known set of labels (default: found in the data)")
    add("--limit", type=int, default=0, metavar="N", help="a random sample of N pictures (default 0 = all)")
    add("--mode", choices=["generate", "likelihood", "both"], default="generate", help="write answers, or compare them")
    add("--prompt", choices=["auto", "options", "plain"], default="auto", help="whether prompts name the answers")
    add("--permutations", type=int, default=3, metavar="K", help="likelihood: orders of the named answers (default 3)")
    add("--by", nargs="*", metavar="COLUMN", help="columns whose groups are compared (default: the data set's own)")
    add("--min-group", type=int, default=20, metavar="N", help="smaller groups are listed, not compared (default 20)")
    add("--compare", metavar="DIR", help="--out of another model on the same data: differences, question by question")
    add("--out", required=True, metavar="DIR", help="folder for scores and answers")
    add("--overwrite", action="store_true", help="begin anew whatever is in --out")
    add("--no-blank", action="store_true", help="leave out the baseline of a grey picture")
    add("--batch-size", type=int, metavar="N", help="questions at once (default: as many as fit)")
    add("--max-new-tokens", type=int, default=60, metavar="N", help="longest answer (default 60; texts need more)")
    add("--seed", type=int, default=0, metavar="N", help="of --limit and of the orders of answers (default 0)")
    add("--gpu-id", type=int, default=0, metavar="N", help="which GPU (default 0; CPU where none is)")
    add(
        "--question-processor",
        default="auto",
        metavar="NAME",
        help="text processor of questions: auto = the checkpoint's (default), identity, blip_caption",
    )
    return parser
