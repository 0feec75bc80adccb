"""Boxes as text are those that published checkpoints were trained on."""

from __future__ import annotations

import pytest

from minigpt4.common.errors import DataError
from minigpt4.conversation.boxes import (
    BoxReader,
    box_text,
    clamped,
    find_boxes,
    grounded_phrase,
    has_area_inside,
    to_percents,
    to_pixels,
)


def test_a_box_in_pixels_becomes_the_published_text() -> None:
    assert box_text(to_percents([3.24, 159.31, 156.4, 312.81], (640, 480))) == "{<0><33><24><98>}"


@pytest.mark.parametrize(("pixel", "percent"), [(29, 28), (57, 56), (50, 50), (100, 100), (-0.9, 0), (-2, -2)])
def test_division_comes_first_and_the_rest_is_cut_towards_zero(pixel: float, percent: int) -> None:
    assert to_percents([pixel, 0, 0, 0], (100, 100))[0] == percent


def test_percents_outside_the_picture_stay_unless_clamped() -> None:
    percents = to_percents([-50, 10, 300, 20], (100, 20))
    assert percents == (-50, 50, 250, 150) and clamped(percents) == (0, 50, 100, 100)


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((0, 0, 1, 1), True),
        ((-5, 0, 5, 5), False),
        ((99, 99, 9, 9), True),
        ((100, 0, 5, 5), False),
        ((5, 5, 0, 9), False),
    ],
)
def test_a_box_covers_a_part_of_the_picture_or_not(box: tuple[int, ...], inside: bool) -> None:
    assert has_area_inside(box, (100, 100)) is inside


def test_boxes_are_found_in_a_text_and_go_back_to_pixels() -> None:
    text = grounded_phrase("two boys", "{<10><12><55><99>}<delim>{<60><-1><90><100>}")
    assert text == "<p>two boys</p> {<10><12><55><99>}<delim>{<60><-1><90><100>}"
    assert find_boxes(text) == [(10, 12, 55, 99), (60, -1, 90, 100)]
    assert to_pixels((10, 12, 55, 99), (640, 480)) == pytest.approx((64.0, 57.6, 352.0, 475.2))


@pytest.mark.parametrize(
    ("order", "unit", "value"),
    [
        ("xywh", "pixels", [20, 29, 20, 20]),
        ("xyxy", "pixels", [20, 29, 40, 49]),
        ("xywh", "0..1", [0.1, 0.29, 0.1, 0.2]),
        ("xyxy", "0..1", "0.1, 0.29, 0.2, 0.49"),
        ("xywh", "0..100", [10, 29, 10, 20]),
        ("xyxy", "0..100", "10 29 20 49"),
    ],
)
def test_one_box_in_every_order_and_unit(order: str, unit: str, value: object) -> None:
    found = BoxReader(order, unit).percents(value, (200, 100))
    # pixels are cut as MiniGPT-v2 cuts them: 29 of 100 pixels is 28 percent
    assert found == (10, 28 if unit == "pixels" else 29, 20, 49)


@pytest.mark.parametrize(
    ("order", "unit", "value", "message"),
    [
        ("xywh", "pixels", [1, 2, 3], "expected x, y, width, height in pixels"),
        ("xyxy", "0..1", "a b c d", "expected left, top, right, bottom in 0..1"),
        ("xywh", "pixels", [1, 2, float("nan"), 4], "expected x, y"),
        ("xyxy", "pixels", [50, 20, 30, 30], "ends before it begins; is it box_format: xywh"),
        ("xywh", "pixels", [150, 60, 190, 90], "to right, bottom 150, 60, 340, 150: outside of 200 x 100 pixels; "
         "is it box_format: xyxy"),
        ("xywh", "pixels", [0.1, 0.2, 0.5, 0.5], "less than a pixel of 200 x 100; is it box_unit: 0..1"),
        ("xywh", "0..1", [10, 20, 50, 50], "covers nothing of a picture of 200 x 100; is it box_unit: 0..100"),
        ("xyxy", "0..1", [0.5, 0.5, 2.0, 1.0], "outside of 0..1"),
        ("xyxy", "0..100", [10, 20, 350, 90], "outside of 0..100; is it box_unit: pixels"),
        ("xywh", "pixels", [250, 0, 10, 10], "covers nothing of a picture of 200 x 100"),
    ],
)  # fmt: skip
def test_a_box_that_cannot_be_meant_so_is_refused(order: str, unit: str, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        BoxReader(order, unit).percents(value, (200, 100))


def test_a_box_drawn_a_little_past_the_edge_is_cut_and_a_loose_one_always() -> None:
    assert BoxReader().percents([-2, 0, 204, 101], (200, 100)) == (0, 0, 100, 100)
    assert BoxReader(is_loose=True).percents([150, 60, 190, 90], (200, 100)) == (75, 60, 100, 100)
