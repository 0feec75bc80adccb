"""Pictures, faces, curves and groups of a report."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4.metrics.accuracy import word_overlap
from minigpt4.report.answers import has_labels, read_answers
from minigpt4.report.blur import Blur
from minigpt4.report.gallery import spread
from minigpt4.report.numbers import clock, number, short
from minigpt4.report.pictures import SIDE, Album, jpeg_url, open_small
from minigpt4.report.svg import HEIGHT, WIDTH, Line, _ticks, chart, thinned
from minigpt4.runners.kept_answers import file_name
from tests.report_parts import Page, picture


def _decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


def test_pictures_are_small_upright_and_carry_no_comment(tmp_path: Path) -> None:
    image = Image.new("RGB", (800, 400), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    exif[0x010E] = "taken at home"
    image.save(tmp_path / "a.jpg", exif=exif, comment=b"a secret")
    small = _decoded(Album(10**6).url(tmp_path / "a.jpg"))
    assert small.size == (SIDE // 2, SIDE) and small.format == "JPEG"
    assert not small.getexif() and "comment" not in small.info


def test_an_album_is_capped_and_counts_what_it_left_out(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    size = len(Album(10**6).url(path))
    album = Album(2 * size + 10)
    assert [bool(album.url(path)) for _ in range(4)] == [True, True, False, False]
    assert album.url(tmp_path / "gone.png") == "" and (album.shown, album.left_out) == (2, 3)
    (tmp_path / "b.png").write_text("no picture")
    album = Album(10**6, max_seconds=60)
    assert album.url(tmp_path / "b.png") == "" and (album.unreadable, album.left_out) == (1, 0)
    assert Album(10**6, max_seconds=-1).url(path) == ""  # time is up


def test_without_opencv_the_whole_picture_is_blurred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    image = open_small(picture(tmp_path / "a.png"), SIDE)
    assert image is not None
    blur = Blur()
    pixels = np.asarray(blur.apply(image))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) <= 8 * 6
    assert (pixels[:20, :20] == pixels[0, 0]).all()
    assert (
        blur.describe()
        == "1 pictures are blurred as a whole (OpenCV is not installed, so faces could not be looked for)."
    )
    assert Blur(is_whole=True).describe() == "0 pictures are blurred as a whole (asked for)."


def test_found_faces_are_blurred_on_both_sides_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[Any] = [[(20, 20, 40, 40)], [(20, 100, 20, 20)], [], []]  # the second in the mirrored picture
    cascade = SimpleNamespace(empty=lambda: False, detectMultiScale=lambda *_: boxes.pop(0) if boxes else [])
    fake = SimpleNamespace(CascadeClassifier=lambda path: cascade, data=SimpleNamespace(haarcascades="x"))
    monkeypatch.setitem(sys.modules, "cv2", fake)
    image = open_small(picture(tmp_path / "a.png"), 640)
    assert image is not None
    blur = Blur()
    before, after = np.asarray(image).astype(int), np.asarray(blur.apply(image)).astype(int)
    changed = np.abs(before - after).sum(2) > 0
    assert changed[8:72, 8:72].any() and changed[94:126, 254:286].any()
    changed[8:72, 8:72] = changed[94:126, 254:286] = False
    assert not changed.any()
    blur.apply(image)  # no face any more
    assert "found them (1 pictures), else the whole picture (1). A detector misses faces" in blur.describe()


def test_opencv_without_cascades_blurs_whole_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(__version__="5.0"))
    assert "OpenCV 5.0 has no face cascades" in Blur().describe()


def test_a_curve_keeps_its_peaks_when_it_is_thinned() -> None:
    points = [(float(x), 1.0) for x in range(5000)]
    points[1234] = (1234.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= 240 and (1234.0, 9.0) in kept and kept == sorted(kept)
    assert thinned(points[:10]) == points[:10]


def test_a_chart_has_axes_a_unit_and_a_value_for_every_place() -> None:
    page = Page(chart("Loss", "per token", [Line("a", [(1, 2.0), (2, 1.0)]), Line("b", [(2, 0.5)], 1, "dots")]))
    assert "per token" in page.text and "window (optimiser steps)" in page.text
    assert "1: a 2" in page.text and "2: a 1, b 0.5" in page.text
    assert sum(tag == "g" and attributes.get("class") == "stop" for tag, attributes in page.tags) == 2
    assert chart("x", "y", [Line("a", [])]) == ""


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 1e9], [-5.0, 5.0], [1e6, 1e6 + 1]])
def test_no_curve_leaves_its_frame(values: list[float]) -> None:
    html = chart("x", "y", [Line("a", list(enumerate(values)), look="dots")], may_be_log=True)
    places = [attributes for tag, attributes in Page(html).tags if tag == "circle"]
    assert len(places) == len(values)
    assert all(0 <= float(at["cx"] or -1) <= WIDTH and 0 <= float(at["cy"] or -1) <= HEIGHT for at in places)
    assert ("logarithmic" in html) == (values == [1e-9, 1e9])


def test_ticks_are_round_numbers() -> None:
    assert _ticks(0, 700, 5) == [0, 200, 400, 600]
    assert _ticks(0.98, 1.05, 4) == pytest.approx([0.98, 1.0, 1.02, 1.04])


def test_labels_are_few_short_and_repeat(tmp_path: Path) -> None:
    path = tmp_path / "faces.jsonl"

    def rows(references: list[str]) -> Any:
        lines = (
            f'{{"id": {n}, "question": "", "answer": "", "reference": "{text}"}}' for n, text in enumerate(references)
        )
        path.write_text("\n".join(lines))
        return read_answers(path).rows

    assert has_labels(rows(["joy", "Fear."] * 3))
    assert not has_labels(rows(["joy"] * 6))
    assert not has_labels(rows(["one man", "two men", "three men"]))
    assert not has_labels(rows(["a man with a long beard", "a woman with short hair"] * 4))


def test_words_in_common_are_counted_once_per_occurrence() -> None:
    assert word_overlap("A happy man.", "a happy MAN") == 1.0
    assert word_overlap("man man", "man") == pytest.approx(2 / 3)
    assert (word_overlap("", "man"), word_overlap("", "...")) == (0.0, 1.0)


def test_examples_are_spread_over_the_whole_set() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75] and spread([1, 2], 4) == [1, 2]


def test_numbers_are_short_and_strange_ones_are_none() -> None:
    assert [short(value) for value in (0.0525, 0.000031, 16375.0, 12.3456, 0.0, None, float("nan"))] == [
        "0.0525", "3.10e-05", "16,375", "12.35", "0", "–", "–"
    ]  # fmt: skip
    assert [number({"a": value}, "a") for value in (1, True, "1", None, float("inf"))] == [1.0, None, None, None, None]
    assert [clock(value) for value in (12, 200, 7500, None)] == ["12 s", "3 min 20 s", "2 h 05 min", "–"]


def test_a_data_set_cannot_write_outside_its_folder() -> None:
    assert [file_name(name) for name in ("faces", "../x/y", "...", "a b")] == ["faces", "_x_y", "_", "a_b"]


def test_a_picture_becomes_a_data_url() -> None:
    assert _decoded(jpeg_url(Image.new("RGB", (8, 6)))).size == (8, 6)
