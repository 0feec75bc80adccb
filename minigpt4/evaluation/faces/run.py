"""A data set, a model, a folder: all answers, all scores.

::

    results.json                       every score, what it depends on, and the baselines
    predictions.generate.jsonl         one line per question: answer, the label read from it, reference
    predictions.likelihood.jsonl       the same for compared answers
    answers.*.jsonl                    what the model gave, from which a run that was cut off goes on
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.chat.loading import Assistant
from minigpt4.common.dist import DistContext
from minigpt4.common.errors import ConfigError
from minigpt4.common.files import open_atomically, write_atomically
from minigpt4.evaluation.engine import AnswerOptions, answer_all
from minigpt4.evaluation.faces.cases import Case, FaceSet
from minigpt4.evaluation.faces.likelihood import ANSWERS, answer_likelihoods
from minigpt4.evaluation.faces.scores import ERROR, Row, read_rows, section_scores, slice_scores
from minigpt4.evaluation.ledger import on_main
from minigpt4.evaluation.questions import Answer, Question

log = logging.getLogger(__name__)

GENERATE, LIKELIHOOD = "generate", "likelihood"
RESULTS = "results.json"
_GREY = (128, 128, 128)
_CANDIDATE_TOKENS = 64
"""Room that the longest compared answer is given in the model's window."""


@dataclass(frozen=True)
class Wishes:
    """What is asked and how it is scored.

    shows_options  whether prompts name the possible answers; None = as the data set does.
    permutations   orders of the possible answers that likelihoods are averaged over, drawn with ``seed``.
    by             columns whose groups are compared; None = the data set's own.
    min_group      smaller groups are listed and not compared.
    """

    modes: tuple[str, ...] = (GENERATE,)
    shows_options: bool | None = None
    permutations: int = 3
    seed: int = 0
    with_blank: bool = True
    by: tuple[str, ...] | None = None
    min_group: int = 20

    def __post_init__(self) -> None:
        for name in ("permutations", "min_group"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")


class FaceEvaluation:
    """One data set in one folder. Nothing is asked twice; ``check`` tells what is wrong before any model is loaded."""

    def __init__(self, faces: FaceSet, wishes: Wishes, out: Path, options: AnswerOptions) -> None:
        self.faces, self.wishes, self.out = faces, wishes, out
        self.options = replace(options, source={**options.source, "data_set": faces.name})
        self.closed = [case for case in faces.cases if case.names]
        if LIKELIHOOD in wishes.modes and not self.closed:
            raise ConfigError(f"mode {LIKELIHOOD}: '{faces.name}' asks for free text, which has no answers to compare")
        self.columns = faces.slices if wishes.by is None else wishes.by
        faces.check_columns(self.columns)

    def cases(self, mode: str) -> Sequence[Case]:
        """What is asked in a mode: likelihoods need a closed set."""
        return self.closed if mode == LIKELIHOOD else self.faces.cases

    def check(self, dist: DistContext) -> None:
        """Raises DataError for answers of another run in the folder."""
        for mode in self.wishes.modes:
            asked = _Asked(self, mode)
            asked.options.ledger(asked.path(""), asked.questions).check(dist)

    def run(self, assistant: Assistant, dist: DistContext) -> dict[str, Any]:
        """All answers and scores, on every rank; rank 0 writes the files."""
        results: dict[str, Any] = {
            "data_set": self.faces.name,
            "notes": list(self.faces.notes),
            "source": dict(self.options.source),
            "generation": {name: value for name, value in asdict(self.options.generation).items() if value},
            "settings": {name: value for name, value in asdict(self.wishes).items()},
            "modes": {},
        }
        self._warn_of_cut_prompts(assistant)
        on_main(dist, self._prepare)
        for mode in self.wishes.modes:
            asked = _Asked(self, mode)
            rows = asked.rows(assistant, dist)
            blank = asked.blank_rows(assistant, dist) if self.wishes.with_blank else []
            results["modes"][mode] = self._scores(rows, blank)
            on_main(dist, partial(write_rows, self.out / f"predictions.{mode}.jsonl", rows))
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        on_main(dist, partial(write_atomically, self.out / RESULTS, text))
        return results

    def _prepare(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        grey = self.out / "blank.png"
        if not grey.is_file():
            draft = grey.with_name(".blank.png")
            Image.new("RGB", (64, 64), _GREY).save(draft)
            draft.replace(grey)

    def _scores(self, rows: Sequence[Row], blank: Sequence[Row]) -> dict[str, Any]:
        sections: dict[str, Any] = {}
        slices: dict[str, Any] = {}
        for name in dict.fromkeys(row.case.section for row in rows):
            own = [row for row in rows if row.case.section == name]
            sections[name] = section_scores(own, [row for row in blank if row.case.section == name])
            found = slice_scores(own, self.columns, self.wishes.min_group)
            slices |= {name: found} if found else {}
        values = {
            key: [scores[key]["value"] for scores in sections.values() if key in scores]
            for key in ("accuracy", "balanced_accuracy", "macro_f1", "rouge_l", "attribute_recall")
        }
        means = {key: round(sum(found) / len(found), 6) for key, found in values.items() if found}
        return {"sections": sections, "mean_over_sections": means} | ({"groups": slices} if slices else {})

    def _warn_of_cut_prompts(self, assistant: Assistant) -> None:
        """Published question processors keep 50 words: a list of options may lose its end."""
        process = assistant.question_processor
        for case in self.closed:
            order = _orders(self, case, GENERATE)[0]
            last = case.names[-1].lower()
            if (
                order is not None
                and last in case.prompt(order).lower()
                and last not in process(case.prompt(order)).lower()
            ):
                log.warning(
                    "the checkpoint's question processor cuts or changes prompts that name the possible answers: '%s'; "
                    "give --question-processor identity, or --prompt plain",
                    process(case.prompt(order)),
                )
                return


class _Asked:
    """The questions of one mode and what becomes of their answers."""

    def __init__(self, evaluation: FaceEvaluation, mode: str) -> None:
        self._mode, self._out = mode, evaluation.out
        self.cases = evaluation.cases(mode)
        self._orders = [_orders(evaluation, case, mode) for case in self.cases]
        self.questions = [
            self._question(f"{case.id}#{number}" if mode == LIKELIHOOD else case.id, case, order)
            for case, orders in zip(self.cases, self._orders, strict=True)
            for number, order in enumerate(orders)
        ]
        options = evaluation.options
        if mode == LIKELIHOOD:
            generation = replace(options.generation, max_new_tokens=_CANDIDATE_TOKENS)
            options = replace(options, respond=answer_likelihoods, generation=generation)
        self.options = replace(options, source={**options.source, "mode": mode}, title=mode)

    def path(self, kind: str) -> Path:
        """The file of answers; ``kind``: '' or 'blank.'."""
        return self._out / f"answers.{kind}{self._mode}.jsonl"

    def rows(self, assistant: Assistant, dist: DistContext) -> list[Row]:
        """Every case with its answer."""
        return self._read(answer_all(assistant, self.questions, self.path(""), self.options, dist))

    def blank_rows(self, assistant: Assistant, dist: DistContext) -> list[Row]:
        """Every case with the answer about grey pictures; the same question is asked once."""
        grey, known, numbers = str(self._out / "blank.png"), dict[str, int](), list[int]()
        questions: list[Question] = []
        for question in self.questions:
            key = json.dumps([question.prompt, len(question.images), question.meta.get(ANSWERS)])
            if key not in known:
                known[key] = len(questions)
                images = (grey,) * len(question.images)
                questions.append(replace(question, id=f"blank {len(questions)}", images=images))
            numbers.append(known[key])
        options = replace(self.options, title=f"{self._mode}, grey picture")
        answers = answer_all(assistant, questions, self.path("blank."), options, dist)
        return self._read([answers[number] for number in numbers])

    def _question(self, identity: str, case: Case, order: Sequence[int] | None) -> Question:
        meta = {ANSWERS: case.answers(order)} if self._mode == LIKELIHOOD else {}
        return Question(identity, case.images, case.prompt(order), meta)

    def _read(self, answers: Sequence[Answer]) -> list[Row]:
        if self._mode == GENERATE:
            return read_rows(self.cases, [answer.text for answer in answers], [answer.error for answer in answers])
        rows, place = [], 0
        for case, orders in zip(self.cases, self._orders, strict=True):
            rows.append(_likeliest(case, answers[place : place + len(orders)]))
            place += len(orders)
        return rows


def _orders(evaluation: FaceEvaluation, case: Case, mode: str) -> list[list[int] | None]:
    """Orders in which prompts name the possible answers; [None] where they do not."""
    wishes, count = evaluation.wishes, len(case.names)
    shows = evaluation.faces.shows_options if wishes.shows_options is None else wishes.shows_options
    if not case.names or not (shows or case.options):
        return [None]
    if mode == GENERATE:
        return [list(range(count))]
    draw = random.Random(f"{wishes.seed}/{case.id}")
    return [draw.sample(range(count), count) for _ in range(wishes.permutations)]


def _likeliest(case: Case, answers: Sequence[Answer]) -> Row:
    """The name with the highest mean log-likelihood over all orders."""
    error = next((answer.error for answer in answers if answer.error), "")
    if error:
        return Row(case, "", None, ERROR, error=error)
    scores = [json.loads(answer.text) for answer in answers]
    means = tuple(round(sum(values) / len(values), 5) for values in zip(*scores, strict=True))
    best = max(range(len(means)), key=means.__getitem__)
    return Row(case, case.names[best], best, likelihoods=means)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One JSON line per row."""
    with open_atomically(path) as file:
        file.writelines(json.dumps(row.record(), ensure_ascii=False) + "\n" for row in rows)


def section_modes(results: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(mode, section, scores) of everything in ``results.json``."""
    modes: Mapping[str, Any] = results["modes"]
    return [(mode, name, scores) for mode, found in modes.items() for name, scores in found["sections"].items()]
