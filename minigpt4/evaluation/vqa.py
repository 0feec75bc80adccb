"""OK-VQA, VizWiz, IconQA, GQA, VSR and Hateful Memes as MiniGPT-v2 is scored on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.chat.loading import Assistant
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import DataError
from minigpt4.evaluation.blocks import Block, first_existing, read_each
from minigpt4.evaluation.engine import AnswerOptions, answer_all
from minigpt4.evaluation.ledger import on_main
from minigpt4.evaluation.questions import Answer, Question
from minigpt4.evaluation.ranking import rank_all
from minigpt4.evaluation.results import Result, write_json
from minigpt4.metrics.vqa import vizwiz_score, vqa_accuracy

_SHORT = "[vqa] Based on the image, respond to this question with a short answer: {}"
_VIZWIZ = (
    "[vqa] The question is '{}' Based on the image, answer the question with a single word or phrase. "
    "and reply 'unanswerable' when the provided information is insufficient"
)
_VSR = "[vqa] Based on the image, is this statement true or false? {}"
_HATEFUL = "This is an image writting '{}'. Is this image hateful? Answer yes or no. Answer:"  # as it was published
_OKVQA_ANNOTATIONS = "mscoco_val2014_annotations_clean.json"


@dataclass(frozen=True)
class Scored:
    """``predictions``: what the published evaluation writes into its file."""

    metric: str
    score: float
    predictions: Any
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """``read`` gives the questions, without loading anything; ``score`` judges generated answers.

    Without ``score`` the candidates of every question are ranked.
    """

    read: Callable[[Block], list[Question]]
    score: Callable[[Block, Sequence[Answer]], Scored] | None


def read_questions(block: Block) -> list[Question]:
    """Everything the benchmark of this name asks. Raises ConfigError and DataError for files that do not fit."""
    questions = BENCHMARKS[block.name].read(block)
    if not questions:
        raise block.complain("eval_file_path", f"'{block.eval_file_path}' holds no questions")
    block.check_pictures([question.images[0] for question in questions])
    return questions


def evaluate_vqa(
    assistant: Assistant,
    block: Block,
    questions: Sequence[Question],
    folder: Path,
    options: AnswerOptions,
    dist: DistContext,
) -> Result:
    """Ask and score one benchmark. Writes ``<name>.jsonl``, and ``<name>.json`` as the published evaluation does."""
    benchmark = BENCHMARKS[block.name]
    if benchmark.score is None:
        return _evaluate_choices(assistant, block, questions, folder, options, dist)
    answers = answer_all(assistant, questions, folder / f"{block.name}.jsonl", options, dist)
    scored = benchmark.score(block, answers)
    on_main(dist, lambda: write_json(folder / f"{block.name}.json", scored.predictions))
    errors = sum(bool(answer.error) for answer in answers)
    return Result(block.name, scored.metric, scored.score, len(answers), errors, dict(scored.details))


def _evaluate_choices(
    assistant: Assistant,
    block: Block,
    questions: Sequence[Question],
    folder: Path,
    options: AnswerOptions,
    dist: DistContext,
) -> Result:
    ranked = rank_all(assistant, questions, folder / f"{block.name}.jsonl", options, dist)
    predictions = [
        {"pred": one.choice, "gt": question.meta["answer"]} for one, question in zip(ranked, questions, strict=True)
    ]
    on_main(dist, lambda: write_json(folder / f"{block.name}.json", predictions))
    right = sum(one["pred"] == one["gt"] for one in predictions)
    errors = sum(bool(one.error) for one in ranked)
    return Result(block.name, "likeliest choice", 100 * right / len(ranked), len(ranked), errors)


def plain_answer(text: str) -> str:
    """Without unknown tokens and surrounding space: how saved predictions are written."""
    return text.replace("<unk>", "").strip()


def _read_okvqa(block: Block) -> list[Question]:
    path, folder = block.annotations("okvqa_test_split.json"), block.pictures()
    block.annotations(_OKVQA_ANNOTATIONS)  # told now, not after the answers

    def question(_: int, record: dict[str, Any]) -> Question:
        stem = f"{int(record['image_id']):012d}.jpg"
        image = first_existing(folder, stem, f"COCO_val2014_{stem}")
        number = int(record["question_id"])
        return block.question(number, image, _SHORT.format(record["question"]), question_id=number)

    return read_each(path, ("image_id", "question", "question_id"), question)


def _score_okvqa(block: Block, answers: Sequence[Answer]) -> Scored:
    texts = {answer.question.meta["question_id"]: plain_answer(answer.text.lower()) for answer in answers}
    path = block.annotations(_OKVQA_ANNOTATIONS)
    try:
        found = vqa_accuracy(texts, read_each(path, ("question_id", "answers"), _annotation))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    predictions = [{"answer": text, "question_id": number} for number, text in texts.items()]
    details = {"by_question_type": found.by_question_type, "by_answer_type": found.by_answer_type}
    return Scored("VQA accuracy", found.overall, predictions, details)


def _annotation(_: int, record: dict[str, Any]) -> dict[str, Any]:
    return record | {"answers": [{**answer, "answer": str(answer["answer"])} for answer in record["answers"]]}


def _read_vizwiz(block: Block) -> list[Question]:
    path, folder = block.annotations("val.json"), block.pictures()

    def question(number: int, record: dict[str, Any]) -> Question:
        answers = [str(answer["answer"]) for answer in record["answers"]]
        image = str(folder / str(record["image"]))
        return block.question(number, image, _VIZWIZ.format(record["question"]), answers=answers)

    return read_each(path, ("image", "question", "answers"), question)


def _score_vizwiz(block: Block, answers: Sequence[Answer]) -> Scored:
    scores = [vizwiz_score(answer.text, answer.question.meta["answers"]) for answer in answers]
    predictions = [{"answer": plain_answer(answer.text)} for answer in answers]
    return Scored("VizWiz accuracy", 100 * sum(scores) / len(scores), predictions, {})


def _read_iconvqa(block: Block) -> list[Question]:
    path, folder = block.annotations("choose_text_val.json"), block.pictures()

    def question(number: int, record: dict[str, Any]) -> Question:
        choices, answer = record["choices"], record["answer"]
        if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"answer {answer!r} is no index of choices {choices!r}")
        image = str(folder / str(record["image_id"]) / "image.png")
        text = _SHORT.format(record["question"])
        return block.question(number, image, text, choices=[str(choice) for choice in choices], answer=answer)

    return read_each(path, ("image_id", "question", "choices", "answer"), question)


def _read_gqa(block: Block) -> list[Question]:
    path, folder = block.annotations("testdev_balanced_questions.json"), block.pictures()

    def question(number: int, record: dict[str, Any]) -> Question:
        image = str(folder / str(record["image"]))
        return block.question(number, image, _SHORT.format(record["question"]), label=str(record["answer"]))

    return read_each(path, ("image", "question", "answer"), question)


def _score_gqa(block: Block, answers: Sequence[Answer]) -> Scored:
    return _exact(answers, lambda text: text.lower(), lambda text: plain_answer(text.lower()))


def _read_vsr(block: Block) -> list[Question]:
    folder = block.pictures()

    def question(number: int, record: dict[str, Any]) -> Question:
        label = "true" if int(record["label"]) == 1 else "false"
        return block.question(number, str(folder / str(record["image"])), _VSR.format(record["caption"]), label=label)

    if block.hub_id:
        return [question(number, dict(record)) for number, record in enumerate(_hub_records(block))]
    path = block.annotations("test.jsonl", "test.json", "test.parquet")
    return read_each(path, ("image", "caption", "label"), question)


def _hub_records(block: Block) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        hint = "give a local file with image, caption and label, or run: pip install datasets"
        raise block.complain("eval_file_path", f"'{block.hub_id}' is no file here; {hint}") from error
    try:
        return load_dataset(block.hub_id, split="test")
    except (OSError, ValueError) as error:
        raise block.complain("eval_file_path", f"'{block.hub_id}' cannot be read from the hub ({error})") from error


def _score_vsr(block: Block, answers: Sequence[Answer]) -> Scored:
    return _exact(answers, lambda text: text.lower(), plain_answer)


def _read_hm(block: Block) -> list[Question]:
    path, folder = block.annotations("dev.jsonl"), block.pictures()

    def question(number: int, record: dict[str, Any]) -> Question:
        image, label = str(folder / str(record["img"])), int(record["label"])
        return block.question(number, image, _HATEFUL.format(record["text"]), label=label)

    return read_each(path, ("img", "text", "label"), question)


def _score_hm(block: Block, answers: Sequence[Answer]) -> Scored:
    return _exact(answers, hateful_label, hateful_label)


def hateful_label(text: str) -> int | str:
    """yes -> 1, no -> 0; any other answer stays as it is, and is wrong."""
    word = text.lower().strip()
    return {"yes": 1, "no": 0}.get(word, word)


def _exact(answers: Sequence[Answer], judged: Callable[[str], object], saved: Callable[[str], object]) -> Scored:
    """Share of answers that equal their label; ``judged`` is compared, ``saved`` is written."""
    right = sum(judged(answer.text) == answer.question.meta["label"] for answer in answers if not answer.error)
    predictions = [{"pred": saved(answer.text), "gt": answer.question.meta["label"]} for answer in answers]
    return Scored("exact answer", 100 * right / len(answers), predictions, {})


BENCHMARKS = {
    "okvqa": Benchmark(_read_okvqa, _score_okvqa),
    "vizwiz": Benchmark(_read_vizwiz, _score_vizwiz),
    "iconvqa": Benchmark(_read_iconvqa, None),
    "gqa": Benchmark(_read_gqa, _score_gqa),
    "vsr": Benchmark(_read_vsr, _score_vsr),
    "hm": Benchmark(_read_hm, _score_hm),
}
"""Names of ``evaluation_datasets`` that eval_vqa.py knows."""
