"""Boxes as text are those that published checkpoints were trained on."""

from __future__ import annotations

import pytest

from minigpt4.conversation.boxes import (
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
