"""The tasks of MiniGPT-v2 as buttons, and how a question is completed by a box that was drawn."""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4.common.errors import DataError
from minigpt4.conversation.boxes import box_text, clamped, find_boxes

IDENTIFY = "[identify]"
_EXPECTED = "write left, top, right, bottom in percent, as {<10><20><60><80>}."


@dataclass(frozen=True)
class Task:
    """A button: its label, the text it writes into the question, and one line of advice."""

    label: str
    text: str
    hint: str


TASKS = (
    Task("Chat", "", "Ask anything, in your own words."),
    Task("Caption", "[caption] please describe this image", "A short description of the picture."),
    Task("Ground", "[grounding] describe this image in detail", "A description with a box for each thing."),
    Task("Refer", "[refer] ", "Write a thing; the answer is where it is. Example: [refer] the person on the left"),
    Task("Detect", "[detection] ", "Write a kind of thing; the answer has all of them. Example: [detection] face"),
    Task("Identify", f"{IDENTIFY} what is this ", "Drag a box over the picture, then send: what is in it?"),
    Task("VQA", "[vqa] ", "Write a question; the answer is short. Example: [vqa] how many people are there"),
)
"""In the order of the page. Tags and texts are those that MiniGPT-v2 was trained with."""
_TAGS = tuple(task.text.split(" ")[0] for task in TASKS if task.text)


def has_task_tag(question: str) -> bool:
    """Whether ``question`` asks for one of the tasks, all of which are about a picture."""
    return question.lstrip().startswith(_TAGS)


def with_box(question: str, box: str) -> str:
    """``question`` with the drawn box behind it, where it is an [identify] that names no box yet.

    Raises DataError when there is no box to put there, or one that says nothing.
    """
    if IDENTIFY not in question or find_boxes(question):
        return question
    found = find_boxes(box)
    if not box.strip():
        raise DataError(f"Drag a box over the picture first, or {_EXPECTED}")
    if len(found) != 1:
        raise DataError(f"'{box.strip()}' is not a box: {_EXPECTED}")
    x1, y1, x2, y2 = clamped(found[0])
    if x1 >= x2 or y1 >= y2:
        raise DataError(f"The box {box_text(found[0])} covers nothing: {_EXPECTED}")
    return f"{question.rstrip()} {box_text((x1, y1, x2, y2))}"
