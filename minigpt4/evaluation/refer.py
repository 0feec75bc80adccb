"""RefCOCO, RefCOCO+ and RefCOCOg as MiniGPT-v2 is scored on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt4.chat.loading import Assistant
from minigpt4.common.dist import DistContext
from minigpt4.evaluation.blocks import Block, first_existing, published_prompt, read_each
from minigpt4.evaluation.engine import AnswerOptions, answer_all
from minigpt4.evaluation.ledger import on_main
from minigpt4.evaluation.questions import Question
from minigpt4.evaluation.results import Result, write_json
from minigpt4.metrics.grounding import begins_with_box, is_located, refer_text
from minigpt4.models.generation import GenerateOptions

log = logging.getLogger(__name__)

SPLITS = {
    "refcoco": {"val": 10834, "testA": 5657, "testB": 5095},
    "refcoco+": {"val": 10758, "testA": 5726, "testB": 4889},
    "refcocog": {"val": 4896, "test": 9602},
}
"""Data set -> split -> expressions of the published file."""
_STEM = 27
"""Letters of COCO_train2014_000000581282; an ``img_id`` goes on with the number of the reference."""
_LAST_ROUND = 4
"""Of the rounds that ask again, counted from 0: from here on any answer is taken, so there are five."""


@dataclass(frozen=True)
class Retries:
    """How expressions without a box are asked again. ``is_legacy``: greedy, the phrase written as a Python list.

    The published script wraps the phrase in one more list every round; with greedy decoding nothing else varied.
    """

    is_wanted: bool = False
    is_legacy: bool = False


def refer_questions(block: Block, split: str) -> list[Question]:
    """One question per expression of a split, numbered in the order of the file. Raises ConfigError and DataError."""
    name = f"{block.name}_{split}.json"
    path, folder = block.annotations(f"{block.name}/{name}", name), block.pictures()

    def question(number: int, record: dict[str, Any]) -> Question:
        stem = str(record["img_id"])[:_STEM]
        image = first_existing(folder, f"{stem}.jpg", f"{stem.rpartition('_')[2]}.jpg")
        x, y, width, height = map(float, record["bbox"])
        meta: dict[str, Any] = {
            "img_id": str(record["img_id"]),
            "sents": str(record["sents"]),
            "bbox": [x, y, width, height],
            "size": [int(record["width"]), int(record["height"])],
        }
        return block.question(number, image, _asked(meta["sents"]), **meta)

    questions = read_each(path, ("img_id", "sents", "bbox", "height", "width"), question)
    block.check_pictures([question.images[0] for question in questions])
    if len(questions) != SPLITS[block.name][split]:
        wanted = SPLITS[block.name][split]
        log.warning("%s: %d expressions, the published file has %d", path, len(questions), wanted)
    return questions


def evaluate_refer(
    assistant: Assistant,
    name: str,
    questions: Sequence[Question],
    folder: Path,
    options: AnswerOptions,
    retries: Retries,
    dist: DistContext,
    resolution: float = 100.0,
) -> Result:
    """Ask, ask again if wanted, score. Writes ``<name>.jsonl``, one more file per round, and ``<name>.json``."""
    found, errors = ask_for_boxes(assistant, name, questions, folder, options, retries, dist)
    score = located_percent(found, questions, resolution)
    by_image: dict[str, list[str]] = {}
    for number, text in found:
        by_image.setdefault(str(questions[number].meta["img_id"]), []).append(text)
    on_main(dist, lambda: write_json(folder / f"{name}.json", by_image))
    details = {"without_box": len(questions) - len(found), "resample": retries.is_wanted}
    return Result(name, "overlap > 0.5", score, len(questions), errors, details)


def ask_for_boxes(
    assistant: Assistant,
    name: str,
    questions: Sequence[Question],
    folder: Path,
    options: AnswerOptions,
    retries: Retries,
    dist: DistContext,
) -> tuple[list[tuple[int, str]], int]:
    """Answers that count, as (number of the question, text) in the order they came; and how many had an error."""
    answers = answer_all(assistant, questions, folder / f"{name}.jsonl", options, dist)
    texts = [refer_text(answer.text) for answer in answers]
    failed = {number for number, answer in enumerate(answers) if answer.error}
    found = [(number, text) for number, text in enumerate(texts) if begins_with_box(text)]
    open_numbers = [n for n, text in enumerate(texts) if n not in failed and not begins_with_box(text)]
    for round_number in range(_LAST_ROUND + 1 if retries.is_wanted else 0):
        if not open_numbers:
            break
        asked = [_again(questions[number], round_number, retries) for number in open_numbers]
        settings = replace(
            options,
            generation=_decoding(options.generation, round_number, retries),
            title=f"{name}, asked again ({round_number + 1})",
        )
        out = folder / f"{name}.again{round_number + 1}.jsonl"
        texts = [refer_text(answer.text) for answer in answer_all(assistant, asked, out, settings, dist)]
        taken = [round_number == _LAST_ROUND or begins_with_box(text) for text in texts]
        found += [(n, text) for n, text, is_taken in zip(open_numbers, texts, taken, strict=True) if is_taken]
        open_numbers = [n for n, is_taken in zip(open_numbers, taken, strict=True) if not is_taken]
    return found, len(failed)


def located_percent(found: Sequence[tuple[int, str]], questions: Sequence[Question], resolution: float) -> float:
    """Percent of all expressions whose answer covers the box; an expression without an answer is wrong."""
    right = sum(_is_right(text, questions[number].meta, resolution) for number, text in found)
    return 100 * right / len(questions)


def _is_right(text: str, meta: Mapping[str, Any], resolution: float) -> bool:
    width, height = meta["size"]
    return is_located(text, meta["bbox"], (width, height), resolution)


def _asked(phrase: str) -> str:
    return f"[refer] give me the location of {phrase}"


def _again(question: Question, round_number: int, retries: Retries) -> Question:
    if not retries.is_legacy:
        return question
    phrase: object = question.meta["sents"]
    for _ in range(round_number + 1):
        phrase = [phrase]
    text = _asked(str(phrase))
    return replace(question, prompt=published_prompt(text) if question.is_rendered else text)


def _decoding(options: GenerateOptions, round_number: int, retries: Retries) -> GenerateOptions:
    if retries.is_legacy:
        return options
    return replace(options, do_sample=True, temperature=0.6, top_p=0.9, seed=round_number)
