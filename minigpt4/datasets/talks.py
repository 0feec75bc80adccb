"""Conversations become turns: LLaVA and ShareGPT (``conversations``), OpenAI (``messages``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, Turn
from minigpt4.datasets.formats import num_images, with_images

_TAG = "<image>"
_SYSTEM = 2
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1, "system": _SYSTEM}
_SPEAKERS = {"conversations": ("human", "gpt"), "messages": ("user", "assistant")}
_SHAPES = {"conversations": "{'from': ..., 'value': text}", "messages": "{'role': ..., 'content': text or parts}"}
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")
_ADDRESS = re.compile(r"^(?!file:)([a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)


@registry.register("format", "conversation")
def conversation(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``conversations``, from/value pairs as in LLaVA and ShareGPT4V; every answer is trained.

    A system text, if there is one, stands in front of the first question.
    """
    return _turns(record, "conversations")


@registry.register("format", "messages")
def messages(record: Mapping[str, Any], prompts: Sequence[str], rng: Random) -> tuple[Turn, ...]:
    """``messages``, role/content pairs as OpenAI writes them; every answer is trained.

    Content is text, or a list of text and image parts. A system message stands in front of the first question.
    """
    return _turns(record, "messages")


def with_part_images(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` with ``images``: the files that image parts of its messages name, unless it names pictures itself.

    Raises DataError for addresses: pictures are read from files.
    """
    said = record.get("messages")
    if num_images(record) or not isinstance(said, list):
        return dict(record)
    contents = [item.get("content") for item in said if isinstance(item, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    names = [name for part in parts if _is_image(part) and (name := _file_of(part))]
    return {**record, "images": names} if names else dict(record)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _IMAGE_PARTS


def _file_of(part: Mapping[str, Any]) -> str:
    value = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), "")
    name = value.get("url") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise DataError(f"field 'messages': an image part holds {value!r}, expected the name of a file")
    if _ADDRESS.match(name):
        shown = name if len(name) < 60 else f"{name[:56]} ..."
        raise DataError(f"field 'messages': '{shown}' is an address; save the picture and write its file name")
    return name.removeprefix("file://")


def _turns(record: Mapping[str, Any], key: str) -> tuple[Turn, ...]:
    said = record.get(key)
    if not isinstance(said, list) or not said:
        keys = ", ".join(map(str, record))
        raise DataError(f"has no '{key}'; found: {keys}; question and answer fields are format 'vqa'")
    entries = [_entry(key, number, item) for number, item in enumerate(said)]
    system = entries.pop(0)[1].strip() if entries[0][0] == _SYSTEM else ""
    _check_order(key, entries, said, len(said) - len(entries))
    texts = [text for _, text in entries]
    if system:
        texts[0] = f"{system}\n{texts[0]}"
    questions = _placed(texts[::2], num_images(record))
    return tuple(Turn(question, answer) for question, answer in zip(questions, texts[1::2], strict=True))


def _entry(key: str, number: int, item: Any) -> tuple[int, str]:
    """Role and text of one entry; an image part becomes a tag. Both spellings are read under both keys."""
    role = text = None
    if isinstance(item, dict):
        role = item["from"] if "from" in item else item.get("role")
        text = item["value"] if "value" in item else item.get("content")
    if isinstance(text, list):
        text = _joined(key, number, text, role)
    if not isinstance(role, str) or not isinstance(text, str):
        raise DataError(f"{key}: position {number} holds {item!r}, expected {_SHAPES[key]}")
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise DataError(f"{key}: position {number} is from '{role}'; known: {known}")
    return _ROLES[role], text


def _joined(key: str, number: int, parts: Sequence[Any], role: Any) -> str:
    pieces = []
    for part in parts:
        if _is_image(part) and _ROLES.get(str(role)) == 0:
            pieces.append(_TAG)
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            where = "text, or a picture in a question"
            raise DataError(f"{key}: position {number} holds the part {part!r}, expected {where}")
    return "\n".join(pieces)


def _check_order(key: str, entries: Sequence[tuple[int, str]], said: Sequence[Any], first: int) -> None:
    """An odd conversation would train a wrong answer, a swapped one would train the questions."""
    for number, (role, text) in enumerate(entries):
        place = number + first
        if role != number % 2:
            found = said[place].get("from", said[place].get("role"))
            raise DataError(f"{key}: position {place} is from '{found}', expected '{_SPEAKERS[key][number % 2]}'")
        if number % 2 and not text.strip():
            raise DataError(f"{key}: the answer at position {place} is empty")
    if len(entries) % 2 or not entries:
        raise DataError(f"{key}: {len(said)} entries; the last question has no answer")


def _placed(questions: Sequence[str], count: int) -> list[str]:
    """Questions with their pictures.

    One picture stands in front of the first question, wherever its tag was in it, as in MiniGPT-4. Several keep their
    places, and so does one of a later question; without any tag they all stand in front.
    """
    tags = [text.count(_TAG) for text in questions]
    if sum(tags) not in (0, count):
        raise DataError(f"has {count} images but {sum(tags)} {_TAG} tags")
    in_place = sum(tags) > 0 and (count > 1 or any(tags[1:]))
    first = _one_line(questions[0], IMAGE_PROMPT if in_place else "")
    if IMAGE_TAG in first and count and not in_place:
        raise DataError(f"the text itself holds '{IMAGE_TAG}'")
    prompts = [first + " " if tags[0] and in_place else with_images(first, 0 if in_place else count)]
    for text, has_tag in zip(questions[1:], tags[1:], strict=True):
        prompts.append((_one_line(text, IMAGE_PROMPT) if has_tag else text) + " ")
    return prompts


def _one_line(text: str, image: str) -> str:
    """``text`` without newlines; each tag becomes ``image``. A newline beside a removed tag leaves no space behind.

    MiniGPT-4 deletes newlines and glues words; here they become one space.
    """

    def replaced(match: re.Match[str]) -> str:
        before, after = (" " if part else "" for part in match.groups())
        return before + image + after if image else before or after

    return re.sub(r"\n+", " ", re.sub(rf"(\n*){_TAG}(\n*)", replaced, text)).strip()
