"""Figures of ``make quickstart-boxes``, and the files that it is scored on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.tools.quickstart_boxes import CHOSEN, constant_boxes, draw_examples, scores_by_phrase


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotation files of a few drawn faces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "dataset"))
        import draw_faces
        import face_formats

        root = tmp_path_factory.mktemp("drawn")
        (root / "images").mkdir()
        items = []
        for index, scene in enumerate(draw_faces.plan_scenes(1, "test", 40)):
            drawing = draw_faces.draw_one(1, "test", index, scene)
            drawing.image.save(root / f"images/{index:06d}.jpg")
            items.append(face_formats.Item(f"{index:06d}", f"images/{index:06d}.jpg", scene, drawing.boxes))
        face_formats.write_json(root / "boxes" / "refer.json", face_formats.refer_records(items))
        face_formats.write_json(root / "boxes" / "detection.json", face_formats.detection_records(items))
        face_formats.write_expressions(root / "boxes", items)
    return root


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_expression_points_into_its_picture_and_at_more_than_a_line(drawn: Path) -> None:
    expressions = read(drawn / "boxes/refcoco/refcoco_val.json")
    assert {"the face", "the mouth", "the left face", "the middle face"} <= {record["sents"] for record in expressions}
    assert len({record["img_id"] for record in expressions}) == len(expressions)
    for record in expressions:
        assert min(record["bbox"][2:]) >= 2 and len(record["img_id"].rpartition("_")[0]) == 27
        with Image.open(drawn / f"boxes/refcoco_images/{record['img_id'][:27]}.jpg") as picture:
            assert picture.size == (record["width"], record["height"])


def test_faces_side_by_side_are_named_from_left_to_right(drawn: Path) -> None:
    places: dict[str, dict[str, float]] = {}
    for record in read(drawn / "boxes/refer.json"):
        if record["phrase"] in ("the left face", "the middle face", "the right face"):
            places.setdefault(record["image"], {})[record["phrase"]] = record["box"][0]
    assert places
    for found in places.values():
        order = [f"the {place} face" for place in ("left", "middle", "right") if f"the {place} face" in found]
        assert len(order) > 1 and sorted(found, key=found.__getitem__) == order


def test_detection_names_as_many_boxes_as_faces(drawn: Path) -> None:
    phrases = [(record["image"], record["phrase"]) for record in read(drawn / "boxes/refer.json")]
    for record in read(drawn / "boxes/detection.json"):
        faces = sum(image == record["image"] and phrase.endswith(" face") for image, phrase in phrases)
        assert record["bbox"].count("{") == faces == 1 + record["bbox"].count("<delim>")


def test_scores_count_missing_answers_as_wrong_and_compare_with_the_mean_box() -> None:
    refer = [{"phrase": "the face", "box": [0, 0, 40, 40]}, {"phrase": "the face", "box": [20, 20, 60, 60]}]
    constant = constant_boxes(refer)
    assert constant == {"the face": [10, 10, 50, 50]}
    base = {"sents": "the face", "width": 100, "height": 100}
    expressions = [
        {**base, "img_id": "a", "bbox": [10, 10, 50, 50]},
        {**base, "img_id": "b", "bbox": [70, 70, 20, 20]},
        {**base, "img_id": "c", "bbox": [60, 60, 30, 30]},
    ]
    scores = scores_by_phrase(expressions, {"a": ["{<10><10><60><60>}"], "b": ["{<70><70><90><90>}"]}, constant)
    assert scores["the face"] == scores["all"]
    assert scores["all"] == {"located": pytest.approx(2 / 3), "constant": pytest.approx(1 / 3), "n": 3}


def test_the_picture_of_examples_shows_two_of_each_phrase(drawn: Path, tmp_path: Path) -> None:
    expressions = read(drawn / "boxes/refcoco/refcoco_val.json")
    answers = {record["img_id"]: ["{<10><10><60><60>}"] for record in expressions}
    draw_examples(expressions, answers, drawn / "boxes/refcoco_images", tmp_path / "boxes.png")
    with Image.open(tmp_path / "boxes.png") as sheet:
        assert sheet.size == (240 * len(CHOSEN), 480)
    assert [path.name for path in tmp_path.iterdir()] == ["boxes.png"]
