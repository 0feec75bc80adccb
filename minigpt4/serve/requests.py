"""The body of a chat request, checked: messages, decoding options, and how the answer is sent.

A parameter that would change the answer and is not supported is refused; one that changes nothing is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.models.generation import GenerateOptions
from minigpt4.serve.errors import ApiError, shown

Fields = Mapping[str, Any]

_READ = (
    "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "repetition_penalty",
    "seed", "stop", "n", "stream", "stream_options",
)  # fmt: skip
_HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
)  # fmt: skip
"""Fields that never change an answer of this server."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Fields that are accepted with the values that change nothing, and refused with others."""


@dataclass(frozen=True)
class Picture:
    """A picture of a message, not read yet: a data URL, or a path."""

    url: str


@dataclass(frozen=True)
class Message:
    """Who speaks (system, user or assistant), and texts and pictures in order."""

    role: str
    parts: tuple[str | Picture, ...]

    @property
    def text(self) -> str:
        """All texts, one a line."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in order."""
        return [part for part in self.parts if isinstance(part, Picture)]


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say it."""

    max_tokens: int = 300
    temperature: float = 0.0


@dataclass(frozen=True)
class ChatRequest:
    """A checked request. ``options.max_new_tokens`` is what was asked for; the window may have less."""

    system: str
    messages: tuple[Message, ...]  # a user's first and last, alternating
    options: GenerateOptions
    model: str | None
    is_streaming: bool
    with_usage: bool


def parse(body: bytes, defaults: Defaults) -> ChatRequest:
    """The request in ``body``. Raises ApiError 400 that names the field."""
    fields = _json(body)
    _check_names(fields)
    is_streaming = _flag(fields, "stream")
    return ChatRequest(
        *_messages(fields),
        options=_options(fields, defaults),
        model=_text(fields, "model"),
        is_streaming=is_streaming,
        with_usage=_with_usage(fields, is_streaming),
    )


def _json(body: bytes) -> Fields:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    try:
        content: Any = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not readable as JSON ({error})", code="invalid_json") from error
    if not isinstance(content, dict):
        raise ApiError(400, f"the body must be a JSON object, got {shown(content)}", code="invalid_json")
    return {name: value for name, value in content.items() if value is not None}  # null means: not given


def _check_names(fields: Fields) -> None:
    for name, value in fields.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            allowed = ", ".join(json.dumps(one) for one in _NEUTRAL[name])
            raise ApiError(400, f"{name} is not supported here (accepted: {allowed})", name, "unsupported_parameter")
        if name not in _READ and name not in _HARMLESS and name not in _NEUTRAL:
            hint = nearest(name, (*_READ, *_NEUTRAL))
            raise ApiError(
                400,
                f"unknown parameter {shown(name)}{hint}; it might change the answer",
                name[:60],
                "unknown_parameter",
            )


def _options(fields: Fields, defaults: Defaults) -> GenerateOptions:
    if _integer(fields, "n", 1) != 1:
        raise ApiError(400, f"n must be 1, got {shown(fields['n'])}", "n", "unsupported_value")
    temperature = _number(fields, "temperature", defaults.temperature, 0, 2)
    is_sampled = temperature > 0
    seed = _integer(fields, "seed", 0, -(2**63), 2**63 - 1)
    top_p, top_k = _number(fields, "top_p", 1.0, 0, 1), _integer(fields, "top_k", 0, -1)
    try:
        return GenerateOptions(  # what does not matter without sampling is left out: such requests share a batch
            max_new_tokens=_max_tokens(fields, defaults),
            do_sample=is_sampled,
            temperature=temperature if is_sampled else 1.0,
            top_p=top_p if is_sampled else 1.0,
            top_k=max(top_k, 0) if is_sampled else 0,
            repetition_penalty=_number(fields, "repetition_penalty", 1.0, 0, math.inf),
            stop=_stop(fields),
            seed=seed if is_sampled and "seed" in fields else None,
        )
    except ConfigError as error:
        raise ApiError(400, str(error), str(error).split()[0], "invalid_value") from error


def _max_tokens(fields: Fields, defaults: Defaults) -> int:
    given = [_integer(fields, name, 1, 1) for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if len(set(given)) > 1:
        raise ApiError(400, f"max_completion_tokens {given[0]} and max_tokens {given[1]} differ", "max_tokens")
    return given[0] if given else defaults.max_tokens


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop", ())
    stop = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    if not isinstance(stop, tuple) or len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(400, f"stop must be a text or a list of up to 4 texts, got {shown(value)}", "stop")
    return tuple(_clean(text, "stop") for text in stop)


def _with_usage(fields: Fields, is_streaming: bool) -> bool:
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or not is_streaming and options:
        raise ApiError(400, "stream_options is an object, and allowed with stream: true only", "stream_options")
    return _flag({name: value for name, value in options.items() if value is not None}, "include_usage")


def _messages(fields: Fields) -> tuple[str, tuple[Message, ...]]:
    """The system text, and the turns."""
    given = fields.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list with at least one message", "messages", "missing_messages")
    messages = [_message(one, f"messages[{place}]") for place, one in enumerate(given)]
    first = next((place for place, one in enumerate(messages) if one.role != "system"), len(messages))
    turns = tuple(messages[first:])
    for place, message in enumerate(turns):
        expected = "assistant" if place % 2 else "user"
        if message.role != expected:
            where = f"messages[{first + place}]"
            raise ApiError(
                400,
                f"{where}: role {message.role}, expected {expected}: after system messages, user and assistant take "
                "turns, a user first",
                f"{where}.role",
                "invalid_order",
            )
    if len(turns) % 2 == 0:
        raise ApiError(400, "the last message must be a user's", "messages", "invalid_order")
    return "\n".join(message.text for message in messages[:first]), turns


def _message(given: Any, where: str) -> Message:
    role = given.get("role") if isinstance(given, dict) else None
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise ApiError(
            400, f"{where}: role {shown(role)}, allowed: system, user, assistant", f"{where}.role", "invalid_value"
        )
    if given.get("tool_calls") or given.get("function_call"):
        raise ApiError(400, f"{where}: tool calls are not supported here", where, "unsupported_parameter")
    content = given.get("content")
    if isinstance(content, str):
        parts: tuple[str | Picture, ...] = (_clean(content, f"{where}.content"),)
    elif isinstance(content, list):
        parts = tuple(_part(part, f"{where}.content[{place}]") for place, part in enumerate(content))
    else:
        raise ApiError(400, f"{where}: content must be a text or a list of parts", f"{where}.content", "invalid_value")
    message = Message(role, parts)
    if role != "user" and message.pictures:
        raise ApiError(400, f"{where}: only a user shows pictures", f"{where}.content", "invalid_value")
    if role == "user" and not message.pictures and not message.text.strip():
        raise ApiError(400, f"{where}: neither a text nor a picture", f"{where}.content", "invalid_value")
    return message


def _part(given: Any, where: str) -> str | Picture:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text" and isinstance(given.get("text"), str):
        return _clean(given["text"], where)
    if kind == "image_url":
        link = given.get("image_url")
        url = link.get("url") if isinstance(link, dict) else link
        if isinstance(url, str) and url:
            return Picture(url)
    raise ApiError(
        400,
        f'{where}: expected {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": {{"url": ...}}}}, '
        f"got type {shown(kind)}",
        where,
        "invalid_value",
    )


def _clean(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{where}: half a character (a lone surrogate) at {error.start}", where) from error
    return text


def _text(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ApiError(400, f"{name} must be a text, got {shown(value)}", name, "invalid_type")
    return value


def _flag(fields: Fields, name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false, got {shown(value)}", name, "invalid_type")
    return value


def _integer(fields: Fields, name: str, default: int, low: int = 0, high: int = 2**31) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a whole number from {low} to {high}, got {shown(value)}", name)
    return value


def _number(fields: Fields, name: str, default: float, low: float, high: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}", name)
    return float(value)
