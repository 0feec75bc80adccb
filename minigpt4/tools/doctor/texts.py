"""What is wrong with the texts of a record, found without a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minigpt4.common.errors import DataError
from minigpt4.conversation.boxes import BoxReader, find_boxes

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
    yield from (text for _, text in _spoken(record))
    instances = record.get("instances")
    for part in instances if isinstance(instances, list) else []:
        if isinstance(part, dict):
            names = ("instruction_with_input", "output")
            yield from (part[name] for name in names if isinstance(part.get(name), str))


def _spoken(record: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """(is an answer, text) of ``conversations`` or ``messages``; an image part reads as a tag. No system texts."""
    said = record.get("conversations", record.get("messages"))
    found = []
    for item in said if isinstance(said, list) else []:
        role = item.get("from", item.get("role")) if isinstance(item, dict) else None
        if role in ("human", "user", "gpt", "assistant"):
            found.append((role in ("gpt", "assistant"), _content(item.get("value", item.get("content")))))
    return found


def _content(value: Any) -> str:
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict)]
        return "\n".join(part["text"] if isinstance(part.get("text"), str) else "<image>" for part in parts)
    return value if isinstance(value, str) else ""


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


def box_problem(value: Any, size: tuple[int, int], reader: BoxReader) -> tuple[str, str] | None:
    """A ``box`` field of a picture of ``size``. None when it is right, and when it is no four numbers at all."""
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        x, y, third, fourth = (float(part) for part in parts or ())
    except (TypeError, ValueError):
        return None
    right, bottom = (x + third, y + fourth) if reader.order == "xywh" else (third, fourth)
    width, height = size if reader.unit == "pixels" else (float(reader.unit[3:]),) * 2
    shown = f"{x:g}, {y:g}, {third:g}, {fourth:g} ({reader.order}, {reader.unit}) in {size[0]} x {size[1]}"
    if right <= x or bottom <= y:
        return "box-order", f"no width or no height: {shown}"
    try:
        reader.percents(value, size)
    except DataError as error:
        return "box-outside", str(error)
    return ("box-clamped", shown) if x < 0 or y < 0 or right > width or bottom > height else None


def has_empty_answer(record: Mapping[str, Any]) -> bool:
    """Whether a field that formats answer with is there and empty."""
    for key in ("answer", "caption", "label", "text"):
        if key in record and _is_blank(record[key]):
            return True
    return any(is_answer and _is_blank(text) for is_answer, text in _spoken(record))


def _is_blank(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_blank(item) for item in value)
    return value is None or (isinstance(value, str) and not value.strip())


def tags_differ(record: Mapping[str, Any], count: int) -> str:
    """'2 images, 1 <image> tags' for a conversation whose tags do not fit its pictures, else ''."""
    tags = sum(text.count("<image>") for is_answer, text in _spoken(record) if not is_answer)
    return f"{count} images, {tags} <image> tags" if tags not in (0, count) else ""


def asked(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Question and answer that a second record must not contradict; None where several answers are usual.

    Captions and long answers differ by nature: only answers of at most six words count.
    """
    said = _spoken(record)
    if said:
        question, answer = (said[0][1], said[1][1]) if len(said) == 2 else (None, None)
    elif "label" in record:
        question, answer = "", record["label"]
    else:
        question, answer = record.get("question"), record.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not 1 <= len(answer.split()) <= 6:
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
