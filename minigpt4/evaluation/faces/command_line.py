"""What ``eval_scripts/eval_faces.py`` and the two programs of the first MiniGPTFace do."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.common.dist import DistContext
    from minigpt4.evaluation.engine import AnswerOptions
    from minigpt4.evaluation.faces.cases import FaceSet
    from minigpt4.evaluation.faces.run import FaceEvaluation, Wishes
    from minigpt4.evaluation.questions import Question

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

    from minigpt4.evaluation.faces.run import FaceEvaluation

    with _started(given.plugins) as context:
        wishes, options = _wishes(given), _options(given)
        identity = _identity(given)
        faces = _read(given, context)
        evaluation = FaceEvaluation(faces, wishes, Path(given.out), options.based_on(identity))
        evaluation.check(context)
        return _score(given, evaluation, context)


def _score(given: argparse.Namespace, evaluation: FaceEvaluation, context: DistContext) -> int:
    from minigpt4.common.logger import console
    from minigpt4.evaluation.faces.compare import differences, read_predictions
    from minigpt4.evaluation.faces.tables import show_differences, show_results

    modes = evaluation.wishes.modes
    others = {mode: read_predictions(Path(given.compare), mode) for mode in modes} if given.compare else {}
    results = evaluation.run(_loaded(given, context), context)
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
    _add_model_flags(parser)
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
    add("--plugins", nargs="+", default=[], metavar="MODULE", help="your modules, which may register a face_set")
    add("--no-blank", action="store_true", help="leave out the baseline of a grey picture")
    add("--max-new-tokens", type=int, default=60, metavar="N", help="longest answer (default 60; texts need more)")
    add("--seed", type=int, default=0, metavar="N", help="of --limit and of the orders of answers (default 0)")
    return parser


def _add_model_flags(parser: argparse.ArgumentParser, cfg_path: str | None = None) -> None:
    """The flags that every program here has. ``cfg_path``: the YAML where neither it nor --ckpt is given."""
    add = parser.add_argument
    told = f" (default {cfg_path}, unless --ckpt is given)" if cfg_path else ""
    add("--ckpt", metavar="DIR", help="checkpoint directory or job folder; needs nothing else")
    add("--cfg-path", metavar="FILE", help=f"YAML file of the model, for published weights{told}")
    parser.set_defaults(usual_cfg_path=cfg_path)
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    add("--gpu-id", type=int, default=0, metavar="N", help="which GPU (default 0; CPU where none is)")
    add("--batch-size", type=int, metavar="N", help="questions at once (default: as many as fit)")
    add("--overwrite", action="store_true", help="begin anew whatever answers are there")
    add(
        "--question-processor",
        default="auto",
        metavar="NAME",
        help="text processor of questions: auto = the checkpoint's (default), identity, blip_caption",
    )


def _cfg_path(given: argparse.Namespace) -> str | None:
    path: str | None = given.cfg_path or (None if given.ckpt else given.usual_cfg_path)
    return path


def _identity(given: argparse.Namespace) -> dict[str, str]:
    from minigpt4.evaluation.identity import model_identity

    return model_identity(given.ckpt, _cfg_path(given), given.options, given.question_processor)


def _loaded(given: argparse.Namespace, context: DistContext) -> Assistant:
    from minigpt4.chat.loading import choose_device, load_assistant

    device = choose_device(given.gpu_id) if context.world_size == 1 else context.device
    return load_assistant(
        given.ckpt, _cfg_path(given), given.options, device, question_processor=given.question_processor
    )


@contextlib.contextmanager
def _started(plugins: Sequence[str] = ()) -> Iterator[DistContext]:
    """Names registered, ranks joined, logs on."""
    from minigpt4 import catalog
    from minigpt4.common import dist
    from minigpt4.common.logger import setup_logging
    from minigpt4.common.schema import RunConfig

    catalog.load(plugins)
    context = dist.init(RunConfig())
    try:
        setup_logging(context.is_main)
        yield context
    finally:
        context.close()


def _with_model(
    given: argparse.Namespace,
    options: AnswerOptions,
    kept: tuple[Path, Sequence[Question]],
    work: Callable[[Assistant, AnswerOptions, DistContext], int],
) -> int:
    """``work`` with the loaded model, after a look at the answers in the file ``kept[0]``."""
    with _started() as context:
        options = options.based_on(_identity(given))
        options.ledger(*kept).check(context)
        return work(_loaded(given, context), options, context)


def validate_emotions(argv: Sequence[str]) -> int:
    """What ``validation_finetuning_Emotions.py`` does; returns the exit code. Raises MiniGPT4Error."""
    parser = argparse.ArgumentParser(
        prog="validation_finetuning_Emotions.py",
        description="Ask for the emotion of every picture in 50 ways: the most frequent answer and its share.",
    )
    add = parser.add_argument
    _add_model_flags(parser)
    add("--image-dir", required=True, metavar="DIR", help="folder of pictures")
    add("--ground-truth", required=True, metavar="FILE", help='JSON: {"file name": "emotion"}')
    add("--output", default="emotion_eval_results.csv", metavar="FILE", help="default: emotion_eval_results.csv")
    add("--num-images", type=int, default=10, metavar="N", help="a random sample; 0 = all (default 10)")
    add("--seed", type=int, default=42, metavar="N", help="of the sample and of the answers (default 42)")
    add("--temperature", type=float, default=0.2, metavar="T", help="0 = the likeliest word (default 0.2)")
    add(
        "--published-score",
        action="store_true",
        help="read emotions by a sentence encoder from 17 categories that are not merged, as the first evaluation did",
    )
    given = parser.parse_args(argv)

    from minigpt4.evaluation.engine import AnswerOptions, answer_all
    from minigpt4.evaluation.faces import consistency
    from minigpt4.models.generation import GenerateOptions

    folder, out = Path(given.image_dir).expanduser(), Path(given.output)
    truth = consistency.read_truth(
        Path(given.ground_truth), folder, given.num_images, given.seed, given.published_score
    )
    questions = consistency.fifty_questions(folder, list(truth))
    categorise = (
        consistency.by_embedding(consistency.sentence_encoder()) if given.published_score else consistency.by_words
    )
    generation = GenerateOptions(
        max_new_tokens=50, do_sample=given.temperature != 0, temperature=given.temperature or 1.0, seed=given.seed
    )
    options = AnswerOptions(generation, given.batch_size, is_overwriting=given.overwrite, title="answers")
    kept = out.with_name(f"{out.name}.answers.jsonl")

    def work(assistant: Assistant, options: AnswerOptions, context: DistContext) -> int:
        answers = answer_all(assistant, questions, kept, options, context)
        scores = consistency.score_pictures(answers, truth, categorise)
        if context.is_main and scores:
            consistency.write_scores(out, scores)
            print("\n".join([*consistency.summary(scores), f"{out}: one line per picture"]))
        return 0 if scores else 1

    return _with_model(given, options, (kept, questions), work)


def caption_folder(argv: Sequence[str]) -> int:
    """What ``demo_finetune_command_line.py`` does; returns the exit code. Raises MiniGPT4Error."""
    parser = argparse.ArgumentParser(
        prog="demo_finetune_command_line.py", description="Ask one question about every picture of a folder."
    )
    add = parser.add_argument
    _add_model_flags(parser, "eval_configs/minigptv2_eval.yaml")
    add("--image-dir", required=True, metavar="DIR", help="folder of pictures, searched with its sub-folders")
    add("--question", default="What is on the picture?", metavar="TEXT", help="default: What is on the picture?")
    add("--limit", type=int, default=100, metavar="N", help="at most N pictures, in order of name (default; 0 = all)")
    add("--output", default="data_list_original.json", metavar="FILE", help='JSON list of {"path", "text"}')
    add("--num-beams", type=int, default=2, metavar="N", help="beam search width (default 2)")
    add("--max-new-tokens", type=int, default=500, metavar="N", help="longest answer (default 500)")
    given = parser.parse_args(argv)

    from minigpt4.common.files import write_atomically
    from minigpt4.evaluation.engine import AnswerOptions, answer_all
    from minigpt4.evaluation.questions import questions_of_folder
    from minigpt4.models.generation import GenerateOptions

    questions = questions_of_folder(Path(given.image_dir).expanduser(), [given.question])
    questions = questions[: given.limit or None]
    out = Path(given.output)
    kept = out.with_name(f"{out.name}.answers.jsonl")
    generation = GenerateOptions(max_new_tokens=given.max_new_tokens, num_beams=given.num_beams)
    options = AnswerOptions(generation, given.batch_size, is_overwriting=given.overwrite, title="captions")

    def work(assistant: Assistant, options: AnswerOptions, context: DistContext) -> int:
        answers = answer_all(assistant, questions, kept, options, context)
        found = [{"path": answer.question.images[0], "text": answer.text} for answer in answers if not answer.error]
        if context.is_main:
            write_atomically(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            print(f"{out}: {len(found)} of {len(answers)} pictures have a text")
        return 0 if found else 1

    return _with_model(given, options, (kept, questions), work)
