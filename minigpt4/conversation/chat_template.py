"""A tokenizer's own chat template as text around questions and answers, taken from it once.

The template is rendered with marks in place of texts and split at them. After that, training and chat write turns
themselves, picture or not, and need no template engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from minigpt4.common.errors import ConfigError

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Messages of a conversation, whether the answer's opening follows -> text."""

_USERS, _ANSWERS = ("QuestionOneMark", "QuestionTwoMark"), ("AnswerOneMark",)
_TODAY = datetime(2024, 7, 26)  # the date Llama's template writes where it is told none
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.+?)\1\s*\)""")


@dataclass(frozen=True)
class TurnFormat:
    """Text around questions and answers.

    first   before and after the first question; the system text of the template, if it writes one, is part of it.
    later   before and after every other question.
    lead    what stands between the opening of an answer and the answer.
    end     what ends an answer.
    """

    first: tuple[str, str]
    later: tuple[str, str]
    lead: str
    end: str


def conversation(questions: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """Messages that alternate, a question first."""
    messages: list[Message] = []
    for place, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        if place < len(answers):
            messages.append({"role": "assistant", "content": answers[place]})
    return messages


def without_clock(template: str) -> str:
    """The template with a fixed date: training today and chat tomorrow must write the same text."""
    return _DATE_CALL.sub(lambda call: repr(_TODAY.strftime(call[2])), template)


def render_chat(tokenizer: Any, messages: Sequence[Message], opens_answer: bool) -> str:
    """Text of ``messages`` by the chat template of a transformers ``tokenizer``.

    Raises ConfigError when it has none, or refuses an ordinary conversation.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    try:
        template = without_clock(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            f"model.prompt_template: the tokenizer of '{name}' has no chat template; "
            "write the text around an instruction, such as '[INST] {} [/INST]'"
        ) from error
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=opens_answer, tokenize=False
        )
    except TemplateError as error:
        raise ConfigError(f"model.prompt_template: the chat template of '{name}' fails: {error}") from error
    return text


def read_turn_format(render: Render, special: Mapping[str, int], name: str) -> TurnFormat:
    """Split two rendered turns at their texts. ``special``: texts of the tokenizer's special tokens.

    An answer ends with the first special token behind it, or where there is none with whatever the template writes
    behind a last answer. Raises ConfigError for templates that hide a text or mark no end of an answer.
    """
    before, after = _split(render(conversation(_USERS[:1], ()), True), _USERS[0], name)
    answered, middle, after_later = _pieces(render(conversation(_USERS, _ANSWERS), True), name)
    end = _end(middle, special) or _last_end(render, name)
    lead = answered.removeprefix(after) if answered.startswith(after) else ""
    return TurnFormat((before, after), (middle.removeprefix(end), after_later), lead, end)


def _pieces(text: str, name: str) -> tuple[str, str, str]:
    """Texts between the first question and its answer, between that and the second question, and behind it."""
    rest = _split(text, _USERS[0], name)[1]
    answered, rest = _split(rest, _ANSWERS[0], name)
    middle, behind = _split(rest, _USERS[1], name)
    return answered, middle, behind


def _split(text: str, mark: str, name: str) -> tuple[str, str]:
    parts = text.split(mark)
    if len(parts) != 2:
        raise ConfigError(
            f"model.prompt_template: the chat template of '{name}' writes a text {len(parts) - 1} times, expected "
            "once; write the text around an instruction yourself, such as '[INST] {} [/INST]'"
        )
    return parts[0], parts[1]


def _end(middle: str, special: Mapping[str, int]) -> str:
    found = [(middle.index(text), -len(text), text) for text in special if text in middle]
    if not found:
        return ""
    place, _, text = min(found)
    return middle[:place] + text


def _last_end(render: Render, name: str) -> str:
    end = _split(render(conversation(_USERS[:1], _ANSWERS), False), _ANSWERS[0], name)[1]
    if not end:
        raise ConfigError(f"model.end_sym: the chat template of '{name}' marks no end of an answer; write one")
    return end
