"""``evaluation_datasets`` of a YAML file: where a benchmark lies and how it is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from minigpt4.common.config_file import PLACEHOLDER
from minigpt4.common.errors import ConfigError, DataError, nearest
from minigpt4.common.types import IMAGE_PROMPT
from minigpt4.common.yaml_source import REPOSITORY_ROOT, find_existing
from minigpt4.conversation.templates import TEMPLATES
from minigpt4.datasets.sources import read_sources
from minigpt4.evaluation.questions import Question

T = TypeVar("T")
PROMPTS = ("published", "chat")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Block:
    """One data set of ``evaluation_datasets``; ``origin`` is the file it is written in."""

    name: str
    origin: Path
    eval_file_path: str = ""  # annotation file, or the folder that holds it
    img_path: str = ""  # folder of the pictures
    max_new_tokens: int = 20  # longest answer
    batch_size: int = 10  # questions at once
    prompt: str = "published"  # how questions are written: published (two BOS, as scores were measured), or chat

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            hint = nearest(self.prompt, PROMPTS)
            raise self.complain("prompt", f"found '{self.prompt}'{hint}, allowed: {', '.join(PROMPTS)}")

    def complain(self, key: str, message: str) -> ConfigError:
        """An error that names the file and the key."""
        return ConfigError(f"{self.origin}: evaluation_datasets.{self.name}.{key}: {message}")

    def question(self, number: object, image: str, text: str, **meta: Any) -> Question:
        """One question about one picture, written as ``prompt`` says: by the published scripts, or as in a chat."""
        is_published = self.prompt == "published"
        return Question(str(number), (image,), published_prompt(text) if is_published else text, meta, is_published)

    def annotations(self, *names: str) -> Path:
        """The annotation file: ``eval_file_path`` itself, or the first of ``names`` that is below it.

        Raises ConfigError that names what was looked for.
        """
        given = self._existing("eval_file_path", self.eval_file_path)
        if given.is_file():
            return given
        for name in names:
            if (given / name).is_file():
                return given / name
        raise self.complain("eval_file_path", f"'{given}' holds none of: {', '.join(names)}")

    @property
    def hub_id(self) -> str:
        """``eval_file_path`` where it is no file here but reads as an id of the Hugging Face hub, else ''."""
        is_local = find_existing(self.eval_file_path, self._roots) is not None
        return "" if is_local or not _HUB_ID.fullmatch(self.eval_file_path) else self.eval_file_path

    def pictures(self) -> Path:
        """The folder of the pictures. Raises ConfigError."""
        folder = self._existing("img_path", self.img_path)
        if not folder.is_dir():
            raise self.complain("img_path", f"'{folder}' is a file, expected the folder of the pictures")
        return folder

    def check_pictures(self, images: Sequence[str]) -> None:
        """Raises ConfigError when none of the first pictures is there: one that is missing is an error of its own."""
        if images and not any(Path(image).is_file() for image in images[:100]):
            raise self.complain("img_path", f"'{images[0]}' not found, nor any of the next {len(images[:100]) - 1}")

    @property
    def _roots(self) -> tuple[Path, ...]:
        return Path.cwd(), self.origin.resolve().parent, REPOSITORY_ROOT

    def _existing(self, key: str, value: str) -> Path:
        if not value:
            raise self.complain(key, "is missing")
        if PLACEHOLDER.search(value):
            raise self.complain(key, f"found the placeholder '{value}'; give a path that exists")
        found = find_existing(value, self._roots)
        if found is None:
            raise self.complain(key, f"'{value}' not found")
        return found


def read_block(name: str, content: Mapping[str, Mapping[str, Any]], origin: Path, changes: Mapping[str, int]) -> Block:
    """The block ``name`` of ``evaluation_datasets``, with ``changes`` of the command line. Raises ConfigError."""
    if name not in content:
        known = ", ".join(content) or "nothing"
        raise ConfigError(f"{origin}: evaluation_datasets.{name}: missing{nearest(name, content)}; found: {known}")
    allowed = {field.name: type(field.default) for field in fields(Block) if field.name not in ("name", "origin")}
    values: dict[str, Any] = {}
    for key, value in {**content[name], **changes}.items():
        if key not in allowed:
            known = ", ".join(allowed)
            raise ConfigError(
                f"{origin}: evaluation_datasets.{name}.{key}: unknown key{nearest(key, allowed)}; known: {known}"
            )
        values[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
        if type(values[key]) is not allowed[key] or (allowed[key] is int and value < 1):
            wanted = "a whole number >= 1" if allowed[key] is int else "text"
            raise ConfigError(f"{origin}: evaluation_datasets.{name}.{key}: found {value!r}, expected {wanted}")
    return Block(name, origin, **values)


def published_prompt(text: str) -> str:
    """A question as the published evaluations send it: MiniGPT-v2's text around one picture.

    It begins with BOS in letters, to which encoding adds BOS: the published scores were measured with two.
    """
    return TEMPLATES["minigpt_v2"].render([], f"{IMAGE_PROMPT} {text}")


def read_each(path: Path, keys: Sequence[str], make: Callable[[int, dict[str, Any]], T]) -> list[T]:
    """``make`` of every record and its number from 0. Raises DataError that names the record where one of ``keys`` is
    missing, or where ``make`` cannot use a value."""
    records, result = read_sources([path]), list[T]()
    for number, record in enumerate(records):
        missing = [key for key in keys if key not in record]
        if missing:
            known = ", ".join(record)
            raise DataError(f"{records.where(number)}: field '{missing[0]}' is missing; found: {known}")
        try:
            result.append(make(number, record))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{records.where(number)}: does not fit ({type(error).__name__}: {error})") from error
    return result


def first_existing(folder: Path, *names: str) -> str:
    """The first of ``names`` that is a file in ``folder``, else the first name."""
    return str(next((folder / name for name in names if (folder / name).is_file()), folder / names[0]))
