"""JSON lists and lines item by item: as Python objects a file takes several times its size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK = 1 << 22
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def stream_list(stream: TextIO) -> Iterator[Any]:
    """Items of a JSON list, without holding the list.

    Raises JSONDecodeError. Commas are not checked, and a number may come in two pieces: lists of records hold objects.
    """
    return (item for item, _, _ in stream_list_places(stream))


def stream_list_texts(stream: TextIO) -> Iterator[tuple[Any, str]]:
    """As ``stream_list``, each item with its own characters of the file, for tools that copy records unchanged."""
    return ((item, text) for item, text, _ in stream_list_places(stream))


def stream_list_places(stream: TextIO) -> Iterator[tuple[Any, str, int]]:
    """As ``stream_list_texts``, with the place of the item too: UTF-8 bytes from where ``stream`` begins.

    The place counts line ends as ``stream`` hands them out; open the file with ``newline=""`` to find it again.
    """
    decoder = json.JSONDecoder()
    text, line = "", 1
    while not text.strip() and (more := stream.read(_CHUNK)):
        text += more
    if text.lstrip()[:1] != "[":
        raise json.JSONDecodeError("expected a list", text, 0)
    place = text.index("[") + 1
    at = _num_bytes(text[:place])
    while True:
        begin = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # matches nothing at least
        at, place = at + begin - place, begin
        if text[place : place + 1] == "]":
            break
        try:
            item, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            more = stream.read(_CHUNK)
            if not more:
                error.lineno += line - 1
                raise
            line += text.count("\n", 0, place)
            text, place = text[place:] + more, 0  # an object that goes on in the next piece
        else:
            content = text[place:end]
            yield item, content, at
            at, place = at + _num_bytes(content), end
    if (text[place + 1 :] + stream.read()).strip():
        raise json.JSONDecodeError("Extra data", text, place + 1)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
