"""What is wrong with the texts of a record, found without a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minigpt4.conversation.boxes import find_boxes, has_area_inside

_CANNOT = r"(?:can['’]?t|cannot|can not|won['’]t|(?:am |['’]m )?(?:unable|not able))"
_REFUSED = (
    r"(?:assist|help|comply|identify|provide|fulfil|process|view|see|analy[sz]e|describe|determine|"
    r"make (?:judge?ments|assumptions))"
)
_REFUSAL = re.compile(
    rf"(?:i['’]?m|i am|we['’]re) (?:very |so |really |truly )?(?:sorry|afraid)\b.{{0,60}}\b{_CANNOT}\b"
    rf"|(?:sorry|unfortunately|apologies|my apologies),? (?:but )?(?:i|we) ?{_CANNOT}\b"
    r"|as an? (?:ai|artificial intelligence|language model|large language model)\b"
    rf"|i ?{_CANNOT} (?:to )?{_REFUSED}\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"<[A-Z][A-Z0-9_ -]{2,}>|\[(?!/?INST\])[A-Z][A-Z0-9_ -]{2,}\]|\{[A-Za-z_][A-Za-z0-9_]*\}|\{\}"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e]")
_MOJIBAKE = re.compile("\ufffd|[ÃÂ][\u0080-\u00bf]|â€|ï»¿")
_BOX_START = re.compile(r"\{<-?\d")
_SHOWN = 60


def is_refusal(answer: str) -> bool:
    """Whether ``answer`` begins like a refusal of a chat program."""
    return _REFUSAL.match(answer.lstrip()) is not None


def record_texts(record: Mapping[str, Any]) -> Iterator[str]:
    """The texts of the fields that formats read."""
    for key in ("question", "answer", "caption", "label", "text", "phrase", "bbox"):
        value = record.get(key)
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))
    for key, names in (("conversations", ("value",)), ("instances", ("instruction_with_input", "output"))):
        parts = record.get(key)
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict):
                yield from (part[name] for name in names if isinstance(part.get(name), str))


def text_problems(text: str) -> Iterator[tuple[str, str]]:
    """Placeholders, control characters, wrongly decoded characters: id of the check and the place in the text."""
    for name, pattern in (("placeholder", _PLACEHOLDER), ("control-characters", _CONTROL), ("mojibake", _MOJIBAKE)):
        found = pattern.search(text)
        if found is not None:
            yield name, around(text, found.start(), found.end())


def box_text_problems(text: str) -> Iterator[tuple[str, str]]:
    """Boxes in text, in percents of the picture."""
    boxes = find_boxes(text)
    if len(boxes) < len(_BOX_START.findall(text)):
        yield "box-order", f"not four numbers: {shortened(text)}"
    for box in boxes:
        shown = "{" + "".join(f"<{value}>" for value in box) + "}"
        x1, y1, x2, y2 = box
        if min(box) < 0 or max(box) > 100:
            yield "box-outside", shown
        elif x1 > x2 or y1 > y2:
            yield "box-order", shown
        elif x1 == x2 or y1 == y2:
            yield "box-empty", shown


def pixel_box_problem(value: Any, size: tuple[int, int]) -> tuple[str, str] | None:
    """A ``box`` field, x, y, width, height in pixels of a picture of ``size``. None when right or no box at all."""
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        x, y, width, height = (float(part) for part in parts or ())
    except (TypeError, ValueError):
        return None
    shown = f"{x:g}, {y:g}, {width:g}, {height:g} in {size[0]} x {size[1]}"
    if width <= 0 or height <= 0:
        return "box-order", f"no width or no height: {shown}"
    if not has_area_inside((x, y, width, height), size):
        return "box-outside", shown
    if x < 0 or y < 0 or x + width > size[0] or y + height > size[1]:
        return "box-clamped", shown
    return None


def has_empty_answer(record: Mapping[str, Any]) -> bool:
    """Whether a field that formats answer with is there and empty."""
    for key in ("answer", "caption", "label", "text"):
        if key in record and _is_blank(record[key]):
            return True
    said = record.get("conversations")
    answers = said[1::2] if isinstance(said, list) else []
    return any(isinstance(item, dict) and _is_blank(item.get("value")) for item in answers)


def _is_blank(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_blank(item) for item in value)
    return value is None or (isinstance(value, str) and not value.strip())


def tags_differ(record: Mapping[str, Any], count: int) -> str:
    """'2 images, 1 tag' for a conversation whose tags do not fit its pictures, else ''. One picture needs no tag."""
    said = record.get("conversations")
    questions = [item for item in said[::2] if isinstance(item, dict)] if isinstance(said, list) else []
    tags = [str(item.get("value")).count("<image>") for item in questions]
    total = sum(tags)
    is_placed = total > 0 and (count > 1 or any(tags[1:]))
    return f"{count} images, {total} <image> tags" if (is_placed or count == 0) and total != count else ""


def asked(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Question and answer that a second record must not contradict; None where several answers are usual.

    Captions and long answers differ by nature: only answers of at most six words count.
    """
    said = record.get("conversations")
    if isinstance(said, list) and len(said) == 2 and all(isinstance(item, dict) for item in said):
        question, answer = said[0].get("value"), said[1].get("value")
    elif "label" in record:
        question, answer = "", record["label"]
    else:
        question, answer = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or len(answer.split()) > 6:
        return None
    return " ".join(question.replace("<image>", " ").casefold().split()), answer.strip(" .").casefold()


def around(text: str, start: int, end: int) -> str:
    """The place of a match with some text around it, on one line; invisible characters are spelled."""
    left, right = max(0, start - 20), min(len(text), end + 20)
    shown = ("…" if left else "") + text[left:right] + ("…" if right < len(text) else "")
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", " ".join(shown.split(" "))).replace("\n", "\\n")


def shortened(text: str) -> str:
    """The beginning of ``text`` on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "…"


def spelled_special(answer: str, special: Sequence[str]) -> str:
    """The first of the tokenizer's special tokens that ``answer`` spells, else ''."""
    return next((text for text in special if text in answer), "")
