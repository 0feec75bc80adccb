"""Conversations of every usual spelling become the same turns; what cannot be trained is told with its place."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, Turn, as_floats
from minigpt4.datasets.image_finder import ImageFinder
from minigpt4.datasets.talks import with_part_images
from tests.data_parts import builder, faces, json_file


def turns(name: str, **record: Any) -> tuple[Turn, ...]:
    result: tuple[Turn, ...] = registry.get("format", name)(record, (), Random(0))
    return result


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def picture(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": name}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def test_both_spellings_give_the_same_turns() -> None:
    said = [("user", "<image>\nWho?"), ("assistant", "Ann."), ("user", "Old?"), ("assistant", "No.")]
    by_role = turns("messages", image="a", messages=[message(*pair) for pair in said])
    by_from = turns("conversation", image="a", conversations=[{"from": who, "value": what} for who, what in said])
    assert by_role == by_from == (Turn(f"{IMAGE_PROMPT} Who? ", "Ann."), Turn("Old? ", "No."))


def test_a_system_text_stands_in_front_of_the_first_question() -> None:
    said = [message("system", "Be brief.\n"), message("user", "<image>\nWho?"), message("assistant", "Ann.")]
    assert turns("messages", image="a", messages=said) == (Turn(f"{IMAGE_PROMPT} Be brief. Who? ", "Ann."),)
    assert turns("messages", images=["a", "b"], messages=[said[0], message("user", "<image> or <image>"), said[2]]) == (
        Turn(f"Be brief. {IMAGE_PROMPT} or {IMAGE_PROMPT} ", "Ann."),
    )


def test_parts_of_a_message_are_joined_and_pictures_keep_their_places() -> None:
    parts = [text("Is"), picture("a.png"), text("like"), {"type": "image"}, text("?")]
    said = [message("user", parts), message("assistant", [text("Yes.")])]
    (turn,) = turns("messages", images=["a.png", "b.png"], messages=said)
    assert turn == Turn(f"Is {IMAGE_PROMPT} like {IMAGE_PROMPT} ? ", "Yes.")


def test_pictures_may_be_named_in_the_messages_alone(tmp_path: Path) -> None:
    names = faces(tmp_path, 2)
    said = [message("user", [picture(names[1]), text("Who?")]), message("assistant", "Ann.")]
    later = [message("user", [{"type": "image", "image": names[0]}, text("And this?")]), message("assistant", "Bob.")]
    info = {"ann_path": json_file(tmp_path / "a.json", [{"messages": said + later}]), "image_path": str(tmp_path)}
    made = builder("mine", {"build_info": info})
    assert made.check() == []
    sample = made.build("train").sample(0, 0, 1)
    assert [turn.prompt for turn in sample.turns] == [f"{IMAGE_PROMPT} Who? ", f"{IMAGE_PROMPT} And this? "]
    assert len(sample.images) == 2 and as_floats(sample.images[0])[0, 0, 0] > as_floats(sample.images[1])[0, 0, 0]


@pytest.mark.parametrize("address", ["https://x.org/a.png", "data:image/png;base64,iVBOR"])
def test_addresses_are_refused(address: str) -> None:
    with pytest.raises(DataError, match="field 'messages': '.*' is an address; save the picture"):
        with_part_images({"messages": [message("user", [picture(address)])]})
    local = with_part_images({"messages": [message("user", [picture("file:///a.png")])]})
    assert ImageFinder(Path("x")).named(local)["images"] == ["/a.png"]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ([message("tool", "x"), message("assistant", "a")], "position 0 is from 'tool'; known: human, user, gpt"),
        ([message("user", "q"), message("user", "q")], "position 1 is from 'user', expected 'assistant'"),
        ([message("system", "s"), message("assistant", "a")], "position 1 is from 'assistant', expected 'user'"),
        ([message("user", "q"), message("system", "s")], "position 1 is from 'system'"),
        ([message("system", "s")], "1 entries; the last question has no answer"),
        ([message("system", "s"), message("user", "q"), message("assistant", " ")], "answer at position 2 is empty"),
        ([message("user", None), message("assistant", "a")], "position 0 holds .*expected {'role'"),
        ([message("user", "q"), message("assistant", [picture("a.png")])], "position 1 holds the part"),
        ([message("user", [{"type": "audio"}])], "position 0 holds the part .*'audio'"),
        ([message("user", "<image> <image>"), message("assistant", "a")], "has 1 images but 2 <image> tags"),
        ("q", "has no 'messages'"),
    ],
)
def test_messages_that_cannot_be_trained_are_told_with_their_place(said: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        turns("messages", image="a", messages=said)
