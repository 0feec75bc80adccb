"""A record becomes turns. YAML names a format; a new one is a function of a few lines.

Every format writes prompts as published checkpoints were trained on them: ``<Img><ImageHere></Img> question `` with a
space at the end, later questions of a conversation ``question ``, questions without a picture ``question``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, Turn
from minigpt4.conversation.boxes import BoxReader, box_text, grounded_phrase

Format = Callable[[Mapping[str, Any], Sequence[str], Random], tuple[Turn, ...]]
"""record, prompts, rng -> turns. Raises DataError that names the field; the caller adds where the record is."""

_PUBLISHED_BOXES = BoxReader(is_loose=True)
PROMPT_ROOT = Path(__file__).resolve().parent.parent / "configs" / "prompts"
TEXT_FIELDS = ("question", "answer", "caption", "phrase")
"""Fields of a record that ``process_text: [fields]`` cleans before a prompt is put around them."""


def num_images(record: Mapping[str, Any]) -> int:
    """Pictures a record names: ``images`` (a list), or ``image``."""
    if record.get("images"):
        return len(record["images"])
    return 1 if record.get("image") else 0


def with_images(question: str, count: int) -> str:
    """The prompt of an instruction on ``count`` pictures. A question that places IMAGE_TAG itself stays as it is."""
    if IMAGE_TAG in question or count == 0:
        return question
    return " ".join([IMAGE_PROMPT] * count + [question]) + " "


def text_field(record: Mapping[str, Any], key: str) -> str:
    """``record[key]`` as text. Raises DataError when it is missing, empty, or no text or number."""
    if key not in record:
        raise DataError(f"has no field '{key}'; found: {', '.join(map(str, record))}; map it: fields: {{{key}: ...}}")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"field '{key}' holds {value!r}, expected text")
    if not str(value).strip():
        raise DataError(f"field '{key}' is empty")
    return str(value)


def drawn_text(record: Mapping[str, Any], key: str, rng: Random) -> str:
    """``record[key]`` as text; one entry of a list, each as likely as often it is there. Empty entries are left out."""
    value = record.get(key)
    usable = [item for item in value if str(item).strip()] if isinstance(value, list) else []
    return text_field({key: rng.choice(usable)} if usable else record, key)


def filled_template(prompts: Sequence[str], text: str, rng: Random) -> str:
    """One of the templates ``prompts`` with ``text`` in the place of ``{}``. Raises DataError for one without."""
    template = rng.choice(prompts)
    if template.count("{}") != 1:
        raise DataError(f"prompts: '{template}' must hold '{{}}' once, where the question goes")
    return template.replace("{}", text)


@registry.register("format", "caption")
def caption(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``image`` and ``caption``: one of the prompts asks; without prompts the picture alone (stage 1)."""
    answer = text_field(record, "caption")
    if not num_images(record):
        raise DataError("has no image; a caption needs one")
    return (Turn(with_images(rng.choice(prompts), num_images(record)) if prompts else IMAGE_TAG, answer),)


@registry.register("format", "vqa")
def vqa(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``question`` and ``answer`` (one is drawn from a list); prompts are templates, ``{}`` is the question."""
    question = text_field(record, "question")
    if prompts:
        question = filled_template(prompts, question, rng)
    return (Turn(with_images(question, num_images(record)), drawn_text(record, "answer", rng)),)


@registry.register("format", "classification")
def classification(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``image`` and ``label``: one of the prompts asks, the label is the answer."""
    if not prompts:
        raise DataError("format 'classification' needs prompts: [\"What emotion does this face show?\"]")
    return (Turn(with_images(rng.choice(prompts), num_images(record)), text_field(record, "label")),)


@registry.register("format", "refer")
def refer(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``phrase`` (one is drawn from a list) and ``box`` (see ``box_format``, ``box_unit``): asks where it is."""
    question = filled_template(prompts or prompt_lines("refer.txt"), drawn_text(record, "phrase", rng), rng)
    return (Turn(with_images(question, num_images(record)), _box_of(record)),)


@registry.register("format", "identify")
def identify(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``phrase`` and ``box`` as in format 'refer', the other way round: asks what is inside the box."""
    question = filled_template(prompts or prompt_lines("identify.txt"), _box_of(record), rng)
    return (Turn(with_images(question, num_images(record)), drawn_text(record, "phrase", rng)),)


@registry.register("format", "detection")
def detection(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``phrase`` and ``bbox`` (text of its boxes in percents): asks for the phrase, answers it with its boxes."""
    phrase = text_field(record, "phrase")
    question = filled_template(prompts or prompt_lines("detection.txt"), phrase, rng)
    return (Turn(with_images(question, num_images(record)), grounded_phrase(phrase, text_field(record, "bbox"))),)


def _box_of(record: Mapping[str, Any]) -> str:
    """``box`` as text in percents of the record's picture, as that is stored; ``box_reader`` knows order and unit."""
    if "image_sizes" not in record or not len(record["image_sizes"]):
        raise DataError("has no image; a box needs one")
    reader: BoxReader = record.get("box_reader", _PUBLISHED_BOXES)
    return box_text(reader.percents(record.get("box"), record["image_sizes"][0]))


@registry.register("format", "text")
def text(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``question`` and ``answer`` without a picture."""
    return (Turn(text_field(record, "question"), text_field(record, "answer")),)


@registry.register("format", "unnatural_instruction")
def unnatural_instruction(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``instances``, as in Unnatural Instructions: the first one is asked.

    Constraints are appended even when they read 'None.', as in MiniGPT-v2.
    """
    instances = record.get("instances")
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise DataError(f"has no 'instances' list; found: {', '.join(map(str, record))}")
    constraints = instances[0].get("constraints")
    question = text_field(instances[0], "instruction_with_input")
    return (Turn(question if constraints is None else f"{question} {constraints}", text_field(instances[0], "output")),)


@cache
def prompt_lines(name: str) -> tuple[str, ...]:
    """Lines of a shipped prompt list."""
    return lines_of(PROMPT_ROOT / name)


def lines_of(path: Path) -> tuple[str, ...]:
    """One prompt per line; empty lines and spaces around a prompt are left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


@dataclass(frozen=True)
class EmotionMapping:
    """Image path -> text that begins with an emotion; asks for the emotion alone or for the whole text.

    With probability ``label_ratio`` a question for the emotion alone is asked and the label is the answer, else a
    description is asked for and the whole text is the answer. ``question_diversity_factor``: share of each question
    list in use. With ``prompts`` these ask, and the whole text is the answer.
    """

    label_ratio: float = 0.5
    question_diversity_factor: float = 1.0
    label_questions: Sequence[str] = field(default_factory=lambda: prompt_lines("emotion_label.txt"))
    description_questions: Sequence[str] = field(default_factory=lambda: prompt_lines("emotion_description.txt"))

    def __call__(self, record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
        """One turn."""
        whole = " ".join(text_field(record, "text").split())
        if prompts:
            return (Turn(with_images(rng.choice(prompts), num_images(record)), whole),)
        is_label = rng.random() < self.label_ratio
        pool = self._in_use(self.label_questions if is_label else self.description_questions)
        answer = emotion_label(whole) if is_label else whole
        return (Turn(with_images(rng.choice(pool), num_images(record)), answer),)

    def _in_use(self, pool: Sequence[str]) -> Sequence[str]:
        count = max(1, int(len(pool) * self.question_diversity_factor))
        return pool if count >= len(pool) else Random("question pool").sample(pool, count)


registry.register("format", "mapping")(EmotionMapping())


def emotion_label(description: str) -> str:
    """Text before the first comma, else the first word; case kept. Raises DataError when that is empty."""
    label, comma, _ = description.partition(",")
    if not comma:
        label = description.split()[0] if description.split() else ""
    if not label.strip():
        raise DataError(f"field 'text' names no emotion: '{description}'")
    return label.strip()


@registry.register("format", "auto")
def auto(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """Chosen by the fields of the records: conversations, messages, instances, caption, question or label."""
    chosen: Format = registry.get("format", recognise(record)[0])
    return chosen(record, prompts, rng)


_SIGNS = (
    ("conversations", "conversation"),
    ("messages", "messages"),
    ("instances", "unnatural_instruction"),
    ("caption", "caption"),
    ("question", "vqa"),
    ("label", "classification"),
)
_NEEDS = {
    "conversation": "conversations",
    "messages": "messages",
    "vqa": "question, answer",
    "text": "question, answer, and no image",
    "caption": "image, caption",
    "classification": "image, label",
    "refer, identify": "image, phrase, box",
    "detection": "image, phrase, bbox",
    "unnatural_instruction": "instances",
}


def recognise(record: Mapping[str, Any], layout: str = "records") -> tuple[str, str]:
    """Name of the format and the reason, words that follow 'records'.

    Raises DataError with the fields found and with those that every format needs, when no field tells.
    """
    if layout == "mapping":
        return "mapping", "of image path and text"
    for key, name in _SIGNS:
        if key in record:
            if name == "vqa" and not num_images(record):
                return "text", "with 'question' and no image"
            return name, f"with '{key}'"
    found = ", ".join(key for key in map(str, record) if key not in ("images", "image_sizes") or record[key])
    needs = "; ".join(f"{name}: {fields}" for name, fields in _NEEDS.items())
    raise DataError(
        f"format auto: no format fits the fields found: {found}. Fields per format: {needs}. "
        "Write format: NAME and fields: {name in this list: your field}"
    )
