"""Answers with boxes: what they name, and the picture they are drawn on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageColor

from minigpt4.conversation.grounding import Entity, read_grounded
from minigpt4.processors.box_drawing import colour, draw_boxes, ink, save_boxes


def text(answer: str) -> str:
    return "".join(piece.text for piece in read_grounded(answer).pieces)


def test_phrases_and_their_boxes_are_read_and_the_rest_is_text() -> None:
    answer = "<p>a dog</p> {<1><2><3><4>}<delim>{<5><6><7><8>} near <p>a tree</p> {<9><10><11><12>}. And <p>unfin"
    assert read_grounded(answer).entities == (
        Entity("a dog", ((1, 2, 3, 4), (5, 6, 7, 8))),
        Entity("a tree", ((9, 10, 11, 12),)),
    )
    assert text(answer) == "a dog near a tree. And unfin"


def test_a_repeated_phrase_is_one_entity_in_one_colour() -> None:
    grounded = read_grounded(
        "<p>A face</p> {<0><0><9><9>} and <p>a  face</p> {<20><20><30><30>}<p>hat</p>{<1><1><2><2>}"
    )
    assert [len(entity.boxes) for entity in grounded.entities] == [2, 1]
    assert [piece.entity for piece in grounded.pieces if piece.entity is not None] == [0, 0, 1]


def test_a_phrase_may_break_its_line() -> None:
    assert read_grounded("<p>two\nboys</p> {<0><0><9><9>}").entities[0].phrase == "two boys"


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("{<10><20><30><40>}", [(10, 20, 30, 40)]),
        ("there: {<10><20><30><40>}", [(10, 20, 30, 40)]),
        ("{<10><20> <30><40>", [(10, 20, 30, 40)]),
        ("[10, 20, 30, 40]", [(10, 20, 30, 40)]),
        ("{<-5><20><130><40>}", [(0, 20, 100, 40)]),
        ("{<30><20><10><40>}", []),
        ("from 10 to 20, 30 of 40", []),
        ("10 20 30", []),
    ],
)
def test_a_box_without_a_phrase_is_found(answer: str, boxes: list[tuple[int, int, int, int]]) -> None:
    assert [box for entity in read_grounded(answer).entities for box in entity.boxes] == boxes


def test_boxes_are_drawn_where_they_are_in_different_colours() -> None:
    entities = [Entity("", ((10, 10, 40, 40),)), Entity("", ((60, 60, 90, 90),))]
    drawn = draw_boxes(Image.new("RGB", (1000, 500), "gray"), entities)
    assert drawn.size == (1000, 500)
    assert drawn.getpixel((101, 100)) == ImageColor.getrgb(colour(0))
    assert drawn.getpixel((700, 301)) == ImageColor.getrgb(colour(1))
    assert drawn.getpixel((250, 125)) == ImageColor.getrgb("gray")


def test_labels_do_not_cover_each_other() -> None:
    names = ["left eye", "right eye", "mouth"]
    labels = [Entity(name, ((10, 30, 60, 60),)) for name in names]
    drawn = draw_boxes(Image.new("RGB", (600, 600), "gray"), labels)
    counts = dict((rgb, count) for count, rgb in drawn.getcolors(100_000) or [])
    # each label is a filled strip of its own colour; of the frames only the last one is seen
    assert all(counts.get(ImageColor.getrgb(colour(index)), 0) > 500 for index in range(3))


def test_a_label_at_the_edge_stays_in_the_picture() -> None:
    blank = Image.new("RGB", (512, 512), "gray")
    framed = draw_boxes(blank, [Entity("", ((90, 0, 100, 5),))])
    labelled = draw_boxes(blank, [Entity("a very long name of a thing at the edge of it all", ((90, 0, 100, 5),))])
    strip = [x for x in range(512) if labelled.getpixel((x, 3)) == ImageColor.getrgb(colour(0))]
    assert framed.size == labelled.size == (512, 512) and len(strip) > 100


def test_the_first_twenty_colours_differ_and_their_ink_reads() -> None:
    colours = [colour(index) for index in range(20)]
    assert len(set(colours)) == 20
    assert {ink(c) for c in colours} == {"#000000", "#ffffff"}


def test_a_small_picture_is_enlarged_and_a_wide_one_reduced() -> None:
    assert draw_boxes(Image.new("L", (64, 32)), []).size == (512, 256)
    assert draw_boxes(Image.new("RGB", (4000, 10)), []).size == (1280, 3)


def test_a_drawn_picture_is_written_whole(tmp_path: Path) -> None:
    save_boxes(Image.new("RGB", (64, 64)), [Entity("nose", ((0, 0, 50, 50),))], tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "a.png").size == (512, 512)
