"""Text of people and models as it is shown in the page: never read as HTML or Markdown."""

from __future__ import annotations

import html
import re

from minigpt4.conversation.grounding import Grounded
from minigpt4.processors.box_drawing import colour, ink

_MARKS = re.compile(r"[\\`*_#|~$]")
_LINK = re.compile(r"\][(\[:]")


def plain(text: str) -> str:
    """``text`` for a place that renders Markdown, every character as it stands."""
    escaped = html.escape(text, quote=False)
    if _LINK.search(text):  # only then: screen readers are given the codes
        escaped = escaped.replace("[", "&#91;").replace("]", "&#93;")
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", escaped).replace("\n", "<br>")


def coloured(grounded: Grounded) -> str:
    """The text of an answer; what has a box is set on the colour of its box."""
    parts = []
    for piece in grounded.pieces:
        if piece.entity is None:
            parts.append(plain(piece.text))
        else:
            ground = colour(piece.entity)
            style = f"background-color:{ground};color:{ink(ground)};border-radius:4px;padding:0 4px"
            parts.append(f'<span style="{style}">{plain(piece.text)}</span>')
    return "".join(parts)
