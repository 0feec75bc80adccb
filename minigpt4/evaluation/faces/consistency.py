"""The same emotion asked for in fifty ways: what a model says most often, and how often it says it."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minigpt4.common.errors import ConfigError, DataError, nearest
from minigpt4.common.files import open_atomically
from minigpt4.datasets.formats import prompt_lines
from minigpt4.evaluation.faces.label_sets import EMOTION8
from minigpt4.evaluation.questions import Answer, Question
from minigpt4.metrics import classification

COLUMNS = (
    "image", "ground_truth", "predicted_emotion", "consistency", "ground_truth_accuracy", "ground_truth_found",
    "emotion_distribution",
)  # fmt: skip
NO_LABEL = "no label"
PUBLISHED_CATEGORIES = (
    "happy", "sad", "angry", "surprised", "fearful", "disgusted", "neutral", "contempt", "joy", "fear", "disgust",
    "anger", "sadness", "surprise", "confusion", "excitement", "calm",
)  # fmt: skip
"""What the first evaluation chose from. Words of one meaning are apart, so a right answer can count as wrong."""
_SUFFIXES = (".png", ".jpg", ".jpeg")
_ENCODER = "all-MiniLM-L6-v2"

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts -> vectors [N, D]."""
Categorise = Callable[[Sequence[str]], list[str]]
"""Responses -> an emotion each; NO_LABEL where there is none."""


@dataclass(frozen=True)
class PictureScore:
    """The answers about one picture; shares in percent."""

    image: str
    ground_truth: str
    predicted: str
    consistency: float
    ground_truth_accuracy: float
    distribution: Mapping[str, int]

    def row(self) -> tuple[object, ...]:
        """Values of COLUMNS."""
        shares = (round(self.consistency, 2), round(self.ground_truth_accuracy, 2))
        found = self.ground_truth_accuracy > 0
        return self.image, self.ground_truth, self.predicted, *shares, found, str(dict(self.distribution))


def read_truth(path: Path, folder: Path, count: int, seed: int, is_published: bool) -> dict[str, str]:
    """File name -> emotion of the pictures in ``folder``; ``count`` of them drawn with ``seed``, 0 = all.

    Labels are those of the eight emotions, unless ``is_published`` keeps them as they are written. Raises DataError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--ground-truth '{path}': cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(label, str) for label in content.values()):
        raise DataError(f'--ground-truth \'{path}\': expected {{"file name": "emotion"}}')
    if not folder.is_dir():
        raise DataError(f"--image-dir '{folder}': no such folder")
    names = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in _SUFFIXES and item.name in content)
    if not names:
        raise DataError(f"--image-dir '{folder}': none of its pictures is in '{path}' ({', '.join(_SUFFIXES)})")
    if 0 < count < len(names):
        names = sorted(random.Random(seed).sample(names, count))
    return {name: content[name] if is_published else _emotion(content[name], f"{path}: '{name}'") for name in names}


def _emotion(text: str, where: str) -> str:
    number = EMOTION8.index(text)
    if number is None:
        known = ", ".join(EMOTION8.labels)
        raise DataError(f"{where}: '{text}' is no emotion{nearest(text, EMOTION8.labels)}; known: {known}")
    return EMOTION8.labels[number].lower()


def fifty_questions(folder: Path, names: Sequence[str]) -> list[Question]:
    """Every shipped question about every picture, each in a conversation of its own."""
    texts = prompt_lines("emotion_validation.txt")
    return [
        Question(f"{name}#{number}", (str(folder / name),), text, {"image": name})
        for name in names
        for number, text in enumerate(texts, start=1)
    ]


def by_words(responses: Sequence[str]) -> list[str]:
    """The one emotion of eight that each response names and does not deny."""
    numbers = [EMOTION8.extract(response).label for response in responses]
    return [NO_LABEL if number is None else EMOTION8.labels[number].lower() for number in numbers]


def by_embedding(embed: Embed) -> Categorise:
    """The published way: the category of PUBLISHED_CATEGORIES whose embedding is the most similar (cosine)."""

    def categorise(responses: Sequence[str]) -> list[str]:
        if not responses:
            return []
        vectors = [np.asarray(embed(texts), dtype=np.float64) for texts in (responses, PUBLISHED_CATEGORIES)]
        answers, known = (item / np.linalg.norm(item, axis=1, keepdims=True) for item in vectors)
        return [PUBLISHED_CATEGORIES[number] for number in (answers @ known.T).argmax(1)]

    return categorise


def sentence_encoder() -> Embed:
    """The sentence encoder of the first evaluation. Raises ConfigError where its package is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError("--published-score needs a package: pip install sentence-transformers") from error
    encoder = SentenceTransformer(_ENCODER)
    return lambda texts: np.asarray(encoder.encode(list(texts)))


def score_pictures(answers: Sequence[Answer], truth: Mapping[str, str], categorise: Categorise) -> list[PictureScore]:
    """One score per picture; pictures that could not be read have none."""
    scores = []
    for name, label in truth.items():
        responses = [answer.text for answer in answers if answer.question.meta["image"] == name and not answer.error]
        if not responses:
            continue
        found = categorise(responses)
        counts = Counter(found)
        named = [(emotion, n) for emotion, n in counts.most_common() if emotion != NO_LABEL]
        predicted, most = named[0] if named else (NO_LABEL, counts[NO_LABEL])
        right = sum(emotion.lower() == label.lower() for emotion in found)
        total = len(found)
        scores.append(PictureScore(name, label, predicted, 100 * most / total, 100 * right / total, counts))
    return scores


def summary(scores: Sequence[PictureScore]) -> list[str]:
    """Lines of the whole: accuracy, macro F1, consistency, and the confusions."""
    truth = [score.ground_truth.lower() for score in scores]
    labels = sorted({*truth, *(score.predicted.lower() for score in scores)} - {NO_LABEL})
    given = [None if score.predicted == NO_LABEL else labels.index(score.predicted.lower()) for score in scores]
    table = classification.count_table([labels.index(label) for label in truth], given, len(labels))
    mean = {
        "consistency": sum(score.consistency for score in scores) / len(scores),
        "answers that are right": sum(score.ground_truth_accuracy for score in scores) / len(scores),
    }
    lines = [
        f"pictures: {len(scores)}",
        f"accuracy of the most frequent answer: {100 * float(classification.accuracy(table)):.1f} %",
        f"macro F1: {100 * float(classification.macro_f1(table)):.1f} %",
        *(f"mean {name}: {value:.1f} %" for name, value in mean.items()),
        "confusions, most frequent answer for each emotion:",
    ]
    for number, label in enumerate(labels):
        row = zip([*labels, NO_LABEL], table[number].astype(int), strict=True)
        told = ", ".join(f"{name} {n}" for name, n in row if n)
        lines += [f"  {label}: {told}"] if told else []
    return lines


def write_scores(path: Path, scores: Sequence[PictureScore]) -> None:
    """The CSV file of the first evaluation, with its columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(path) as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(score.row() for score in scores)
