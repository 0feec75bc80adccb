"""Scores of short answers: VQA accuracy with the official normalisation, and VizWiz' rule."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minigpt4.common.errors import DataError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32
"""The official scorer hands a flag to the place of a count; answers are far shorter."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
# The public VQA evaluation's list. Most entries leave one apostrophe out of the right spelling; what it does otherwise
# ("somebody'd", "she's") stays as it is: scores are compared with those of others.
_SPELLINGS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_DOUBLE = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've someone'd've something'd've there'd've
they'd've we'd've who'd've wouldn't've you'd've
"""
_OTHERS = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    found = {word.replace("'", ""): word for word in _SPELLINGS.split()}
    for word in _DOUBLE.split():
        start, middle, _ = word.split("'")
        found[f"{start}{middle}'ve"] = found[f"{start}'{middle}ve"] = word
    return found | _OTHERS


CONTRACTIONS = _contractions()
"""Spelling without an apostrophe -> the one that answers are compared in."""


@dataclass(frozen=True)
class VqaAccuracy:
    """Percent, rounded to 2 places: over all questions, by question type and by answer type."""

    overall: float
    by_question_type: dict[str, float]
    by_answer_type: dict[str, float]


def without_punctuation(text: str) -> str:
    """``text`` with marks removed where one stands beside a space, or a number holds a comma, else made a space."""
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        is_dropped = has_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_dropped else " ")
    return _FULL_STOP.sub("", result, count=_MOST_STOPS)


def in_common_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe, single spaces."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(answer: str, references: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the references of min(1, how many of the others say the same / 3), 0..1.

    references: the official records with ``answer``; a reference's "others" are the records that differ from it.
    Texts are normalised only where the references are not all the same.
    """
    given = _one_line(answer)
    records = [{**record, "answer": _one_line(str(record["answer"]))} for record in references]
    if len({record["answer"] for record in records}) > 1:
        given = in_common_words(without_punctuation(given))
        records = [{**one, "answer": in_common_words(without_punctuation(one["answer"]))} for one in records]
    scores: list[float] = []
    for record in records:
        same = sum(other != record and other["answer"].lower() == given.lower() for other in records)
        scores.append(min(1.0, same / 3))
    return sum(scores) / len(scores)


def vqa_accuracy(answers: Mapping[Any, str], annotations: Sequence[Mapping[str, Any]]) -> VqaAccuracy:
    """VQA accuracy of ``answers`` by question id. Raises DataError when the two do not hold the same questions."""
    known = {annotation["question_id"] for annotation in annotations}
    if known != set(answers):
        lost, extra = sorted(known - set(answers))[:3], sorted(set(answers) - known)[:3]
        raise DataError(
            f"{len(answers)} answers for {len(known)} annotated questions; without an answer: {lost or 'none'}, "
            f"without an annotation: {extra or 'none'}"
        )
    scores: list[float] = []
    question_types: dict[str, list[float]] = {}
    answer_types: dict[str, list[float]] = {}
    for annotation in annotations:
        score = vqa_score(answers[annotation["question_id"]], annotation["answers"])
        scores.append(score)
        question_types.setdefault(str(annotation.get("question_type", "")), []).append(score)
        answer_types.setdefault(str(annotation.get("answer_type", "")), []).append(score)
    return VqaAccuracy(_percent(scores), _percents(question_types), _percents(answer_types))


def vizwiz_score(answer: str, references: Sequence[str]) -> float:
    """min(1, how many of the people gave this answer / 3); equal but for case, nothing else is evened out."""
    return min(1.0, sum(reference.lower() == answer.lower() for reference in references) / 3)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2)


def _percents(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: _percent(scores) for name, scores in sorted(groups.items())}
