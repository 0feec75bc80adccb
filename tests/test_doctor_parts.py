"""Pieces of the doctor on their own: hashes of pictures, ends of files, texts, spread samples."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.tools.doctor.compare import NEAR, _Patterns
from minigpt4.tools.doctor.html import thumbnail
from minigpt4.tools.doctor.opening import spread
from minigpt4.tools.doctor.pictures import difference_hash, examine_picture
from minigpt4.tools.doctor.result import Result
from minigpt4.tools.doctor.texts import asked, is_refusal, text_problems
from tests.doctor_parts import picture


def bits(one: Image.Image, other: Image.Image) -> int:
    first, second = difference_hash(one), difference_hash(other)
    assert first is not None and second is not None
    return (first ^ second).bit_count()


def test_a_scaled_and_compressed_picture_keeps_its_pattern() -> None:
    stream = io.BytesIO()
    picture(3).resize((300, 240)).save(stream, "JPEG", quality=40)
    assert bits(picture(3), Image.open(stream)) <= NEAR
    assert bits(picture(3), picture(4)) > 3 * NEAR


def test_a_flat_picture_has_no_pattern() -> None:
    assert difference_hash(Image.new("RGB", (50, 50), (9, 90, 200))) is None


@pytest.mark.parametrize("changed", [0, 1, NEAR, NEAR + 1])
def test_patterns_are_found_up_to_the_allowed_number_of_bits(changed: int) -> None:
    pattern = 0x0123456789ABCDEF
    other = pattern
    for number in range(changed):
        other ^= 1 << (13 * number + 5) % 64  # one in every band
    found = _Patterns([(pattern, (1, 7))]).find(other)
    assert found == ((changed, (1, 7)) if changed <= NEAR else None)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_file_is_found_by_its_end_without_decoding_the_others(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    picture(1, (200, 200)).save(whole, kind)
    cut.write_bytes(whole.read_bytes()[: -len(whole.read_bytes()) // 3])
    assert [check for check, _ in examine_picture(cut, decode=False, compare=False).problems] == ["image-truncated"]
    monkeypatch.setattr("minigpt4.tools.doctor.pictures._decode", lambda image: pytest.fail("decoded"))
    assert examine_picture(whole, decode=False, compare=False).problems == ()


def test_something_behind_the_end_of_a_picture_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture(1).save(path)
    path.write_bytes(path.read_bytes() + b"written by a camera")
    assert examine_picture(path, decode=False, compare=False).problems == ()


def test_damage_in_the_middle_of_a_picture_needs_decode(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(1, (200, 200)).save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    assert examine_picture(path, decode=False, compare=False).problems == ()
    assert [check for check, _ in examine_picture(path, True, False).problems] == ["image-truncated"]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I cannot identify people.",
        "Sorry, I can't help with that request.",
        "As an AI language model, I do not see pictures.",
        "I am unable to determine the emotion of the person.",
        "I cannot provide information about race.",
    ],
)
def test_refusals_are_known(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    ["The person looks sorry.", "As an artist, she paints.", "I am sorry for the loss.", "I can see a man.", "No."],
)
def test_ordinary_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    ("text", "checks"),
    [
        ("Name the [NAME] of {person}", ["placeholder"]),
        ("[INST] <Img><ImageHere></Img> [refer] a <p>cup</p> {<1><2><3><4>} [/INST]", []),
        ("a tab\tand a line\nbreak, café, 5 £, Ärger", []),
        ("itâ€™s", ["mojibake"]),
        ("a zero\x00", ["control-characters"]),
    ],
)
def test_texts_are_read_for_what_a_program_left_behind(text: str, checks: list[str]) -> None:
    assert [check for check, _ in text_problems(text)] == checks


def test_long_answers_and_captions_do_not_contradict_each_other() -> None:
    assert asked({"question": "Smiling?", "answer": "Yes."}) == ("smiling?", "yes")
    assert asked({"question": "Describe.", "answer": "one two three four five six seven"}) is None
    assert asked({"caption": "a cup"}) is None
    assert asked({"question": "Colour?", "answer": ["red", "dark red"]}) is None


def test_a_sample_reaches_from_the_first_to_the_last_part() -> None:
    assert list(spread(10, 5)) == [0, 2, 4, 6, 8]
    assert list(spread(3, 5)) == list(spread(3, 0)) == [0, 1, 2]


def test_places_are_shown_without_their_folders() -> None:
    result = Result("faces", folders={"annotations": "/data", "pictures": "/data/images"})
    assert result.short("/data/a.jsonl, line 3 [/data/images/1.jpg]") == "a.jsonl, line 3 [1.jpg]"


def test_a_thumbnail_of_what_is_no_picture_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert thumbnail(str(tmp_path / "a.jpg")) == thumbnail(str(tmp_path / "gone.jpg")) == thumbnail("") == ""
