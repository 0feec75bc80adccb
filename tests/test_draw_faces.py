"""Drawn faces: deterministic, balanced, and readable in every format."""

from __future__ import annotations

import csv
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "dataset"))

import draw_faces  # noqa: E402
import face_drawing  # noqa: E402
import face_formats  # noqa: E402
import face_text  # noqa: E402

SIZES = ["--train", "200", "--test", "150", "--align", "20", "--shard-size", "80", "--per-section", "40"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faces") / "data"
    draw_faces.main(["--out", str(out), "--seed", "3", *SIZES])
    return out


def _single(**changes: object) -> face_drawing.Scene:
    values: dict[str, object] = {
        "expression": "happy",
        "hair_colour": "red",
        "hair_style": "short",
        "skin": "III",
        "glasses": True,
        "beard": False,
        "pose": "left",
        "gaze": "ahead",
    }
    return face_drawing.Scene((face_drawing.Person(**{**values, **changes}),))  # type: ignore[arg-type]


def test_same_seed_and_index_draw_the_same_picture() -> None:
    first = draw_faces.draw_one(5, "train", 7, _single()).image.tobytes()
    assert first == draw_faces.draw_one(5, "train", 7, _single()).image.tobytes()
    assert first != draw_faces.draw_one(5, "train", 8, _single()).image.tobytes()
    assert first != draw_faces.draw_one(5, "test", 7, _single()).image.tobytes()


def test_a_second_run_keeps_the_folder_and_other_settings_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / "manifest.json").stat().st_mtime_ns
    draw_faces.main(["--out", str(root), "--seed", "3", *SIZES])
    assert "already complete" in capsys.readouterr().out.replace("\n", " ")
    assert (root / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        draw_faces.main(["--out", str(root), "--seed", "4", *SIZES])


def test_an_interrupted_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(draw_faces, "write_formats", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_faces.main(["--out", str(tmp_path / "data"), "--train", "100", "--test", "100"])
    assert list(tmp_path.iterdir()) == []


def test_attribute_values_occur_equally_often() -> None:
    people = [scene.people[0] for scene in draw_faces.plan_scenes(1, "train", 1000) if len(scene.people) == 1]
    for attribute in ("expression", "hair_style", "skin", "glasses", "beard", "pose", "gaze"):
        counts = Counter(getattr(person, attribute) for person in people).values()
        assert max(counts) - min(counts) <= 1, attribute


def test_no_answer_of_a_test_question_type_is_more_frequent_than_another(root: Path) -> None:
    questions = json.loads((root / "test" / "questions.json").read_text())
    assert {question["type"] for question in questions} == set(face_text.QUESTION_TYPES)
    for kind, answers in face_text.ANSWERS.items():
        counts = Counter(question["answer"] for question in questions if question["type"] == kind)
        assert set(counts) == set(answers)
        assert len(set(counts.values())) == 1, kind
    with (root / "test" / "questions.csv").open() as stream:
        assert [row["answer"] for row in csv.DictReader(stream)] == [question["answer"] for question in questions]


def test_all_sixteen_sections_hold_conversations_with_existing_pictures(root: Path) -> None:
    sections = json.loads((root / "facegpt4vision" / "by_section.json").read_text())
    assert len(sections) == 16 and tuple(sections) == face_formats.SECTION_NAMES
    for name, records in sections.items():
        assert records, name
        for record in records:
            assert (root / record["image"]).is_file()
            assert record["conversations"][0]["value"].startswith("<image>\n")


def test_sharegpt_conversations_alternate_and_some_have_several_turns(root: Path) -> None:
    records = json.loads((root / "sharegpt" / "sharegpt_faces.json").read_text())
    for record in records:
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (
            len(record["conversations"]) // 2
        )
    assert max(len(record["conversations"]) for record in records) > 2
    assert len({record["id"] for record in records}) == len(records)


def test_shards_hold_picture_text_and_json_per_key(root: Path) -> None:
    shards = sorted((root / "shards").glob("*.tar"))
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(shards[0]) as tar:
        names = tar.getnames()
        assert names[:3] == ["000000000.jpg", "000000000.txt", "000000000.json"] and len(names) == 240
        member = tar.extractfile("000000000.json")
        assert member is not None
        caption = json.loads(member.read())["caption"]
    assert caption == face_text.blip_caption(caption)


def test_align_folder_and_emotions_name_existing_pictures(root: Path) -> None:
    annotations = json.loads((root / "align" / "filter_cap.json").read_text())["annotations"]
    assert len(annotations) == 20
    for record in annotations:
        with Image.open(root / "align" / "image" / f"{record['image_id']}.jpg") as image:
            assert image.size == (112, 112)
    emotions = json.loads((root / "emotions" / "emotions.json").read_text())
    for path, text in emotions.items():
        assert (root / path).is_file() and text.split(",")[0] in face_text.ANSWERS["expression"]


def test_boxes_are_percent_text_and_eyes_lie_in_the_face(root: Path) -> None:
    records = json.loads((root / "boxes" / "train.json").read_text())
    for record in records:
        for part in record["boxes"].values():
            assert re.fullmatch(r"\{<\d{1,3}><\d{1,3}><\d{1,3}><\d{1,3}>\}", part["text"])
        face, eyes = record["boxes"]["face"]["bbox"], record["boxes"]["eyes"]["bbox"]
        assert face[1] < eyes[1] and eyes[1] + eyes[3] < face[1] + face[3]
    assert face_formats.box_text((-3.0, 28.0, 56.0, 130.0)) == "{<0><25><50><100>}"


def test_turned_heads_move_the_eyes_to_that_side() -> None:
    middle = {}
    for pose in face_drawing.POSES:
        boxes = draw_faces.draw_one(1, "train", 3, _single(pose=pose)).boxes[0]
        middle[pose] = boxes["eyes"][0] + boxes["eyes"][2] - boxes["face"][0] - boxes["face"][2]
    assert middle["left"] < middle["frontal"] - 4 < middle["frontal"] + 4 < middle["right"]


def test_description_and_caption_follow_the_fixed_grammar() -> None:
    assert (
        face_text.description(_single())
        == "A happy person with short red hair and type III skin. Glasses, no beard, head left, eyes ahead."
    )
    angry = _single(expression="angry", hair_style="bald", glasses=False)
    assert (
        face_text.caption(angry)
        == "an angry person with a bald head and type iii skin, no glasses, no beard, head left, eyes ahead"
    )
    assert "hair colour" not in face_text.answers_of(angry)


def test_photographs_are_split_evenly_and_without_overlap(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    import write_photos

    write_photos.main(["--out", str(tmp_path / "photos")])
    rows = {}
    for name, count in (("train", 140), ("test", 60)):
        with (tmp_path / "photos" / f"{name}.csv").open() as stream:
            rows[name] = list(csv.DictReader(stream))
        assert len(rows[name]) == count
        assert Counter(row["answer"] for row in rows[name]) == {"Yes": count // 2, "No": count // 2}
        assert all((tmp_path / "photos" / row["image"]).is_file() for row in rows[name])
    assert not {row["image"] for row in rows["train"]} & {row["image"] for row in rows["test"]}
    assert (tmp_path / "photos" / "astronaut.png").is_file()
