"""Face data sets in their official layouts: labels in their order, and mistakes that name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4 import catalog
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.registry import registry
from minigpt4.evaluation.faces import label_sets
from minigpt4.evaluation.faces.cases import FaceSet, Source
from minigpt4.evaluation.faces.readers.people import CELEBA_NAMES

FERPLUS = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
PIXELS = " ".join(["7"] * 48 * 48)


def read(name: str, root: Path, **wishes: Any) -> FaceSet:
    catalog.load()
    faces: FaceSet = registry.get("face_set", name)(Source(root, cache=root / "cache", **wishes))
    return faces


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def labels(faces: FaceSet) -> list[str]:
    return [case.reference for case in faces.cases]


def test_labels_stand_in_the_official_orders() -> None:
    orders = {
        "AFFECTNET8": "Neutral Happy Sad Surprise Fear Disgust Anger Contempt",
        "AFFECTNET7": "Neutral Happy Sad Surprise Fear Disgust Anger",
        "RAF_DB": "Surprise Fear Disgust Happiness Sadness Anger Neutral",
        "FER2013": "Angry Disgust Fear Happy Sad Surprise Neutral",
        "FERPLUS": "neutral happiness surprise sadness anger disgust fear contempt",
        "UTKFACE_RACE": "White Black Asian Indian Others",
    }
    assert {name: " ".join(getattr(label_sets, name).labels) for name in orders} == orders
    assert len(CELEBA_NAMES) == 40 and CELEBA_NAMES.index("Male") == 20 and CELEBA_NAMES[39] == "Young"


def affectnet(root: Path) -> None:
    for number, expression in ((3, "1"), (10, "7"), (11, "8")):
        picture(root / f"val_set/images/{number}.jpg")
        (root / "val_set/annotations").mkdir(exist_ok=True)
        np.save(root / f"val_set/annotations/{number}_exp.npy", np.array(expression))


def rafdb(root: Path) -> None:
    picture(root / "Image/aligned/test_0001_aligned.jpg")
    write(root / "EmoLabel/list_patition_label.txt", "train_00001.jpg 5", "test_0001.jpg 4")


def fer2013(root: Path) -> None:
    write(root / "fer2013.csv", "emotion,pixels,Usage", f"0,{PIXELS},Training", f"3,{PIXELS},PrivateTest")


def ferplus(root: Path) -> None:
    write(root / "fer2013.csv", "emotion,pixels,Usage", f"0,{PIXELS},PrivateTest", f"3,{PIXELS},PrivateTest")
    write(
        root / "fer2013new.csv",
        FERPLUS,
        "PrivateTest,fer1.png,5,0,0,0,5,0,0,0,0,0",
        "PrivateTest,fer2.png,0,1,0,0,0,0,2,6,1,0",
    )


def celeba(root: Path) -> None:
    values = " ".join("1" if name in ("Bald", "Young") else "-1" for name in CELEBA_NAMES)
    write(root / "list_attr_celeba.txt", "2", " ".join(CELEBA_NAMES), f"000001.jpg  {values}", f"000002.jpg {values}")
    write(root / "list_eval_partition.txt", "000001.jpg 2", "000002.jpg 0")
    picture(root / "img_align_celeba/000001.jpg")


def utkface(root: Path) -> None:
    picture(root / "UTKFace/26_1_3_20170101.jpg.chip.jpg")
    picture(root / "UTKFace/61_3_20170109.jpg")


def fairface(root: Path) -> None:
    write(
        root / "fairface_label_val.csv",
        "file,age,gender,race,service_test",
        "val/1.jpg,3-9,Male,East Asian,False",
        "val/2.jpg,more than 70,Female,Latino_Hispanic,True",
    )
    picture(root / "val/1.jpg")
    picture(root / "val/2.jpg")


def facexbench(root: Path) -> None:
    picture(root / "benchmark/images/a/question_1_1.png")
    picture(root / "benchmark/images/a/question_1_2.png")
    question = {
        "image_paths": ["images/a/question_1_1.png", "images/a/question_1_2.png"],
        "question_text": "How many are sad?",
        "options": [0, 2, 1, 3],
        "correct_answer_option": "C",
    }
    about = {"category": "expression", "sub-category": "counting", "num_images": "multiple"}
    write(root / "benchmark/a.json", json.dumps(about | {"questions": {"1": question}}))


@pytest.mark.parametrize(
    ("name", "layout", "found"),
    [
        ("affectnet8", affectnet, ["Happy", "Contempt"]),
        ("affectnet7", affectnet, ["Happy"]),
        ("rafdb", rafdb, ["Happiness"]),
        ("fer2013", fer2013, ["Happy"]),
        ("ferplus", ferplus, ["contempt"]),
        ("celeba", celeba, ["Yes", *["No"] * 7]),
        ("utkface", utkface, ["20-29", "Female", "Indian"]),
        ("fairface", fairface, ["3-9", "Male", "East Asian", "more than 70", "Female", "Latino_Hispanic"]),
        ("facexbench", facexbench, ["1"]),
    ],
)
def test_a_data_set_is_read_as_its_owners_lay_it_out(
    tmp_path: Path, name: str, layout: Callable[[Path], None], found: list[str]
) -> None:
    layout(tmp_path)
    faces = read(name, tmp_path)
    assert labels(faces) == found
    assert all(Path(image).is_file() for case in faces.cases for image in case.images)
    assert all(case.names[case.target or 0] == case.reference for case in faces.cases)


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    for layout in (affectnet, utkface, ferplus):
        layout(tmp_path)
    assert read("affectnet7", tmp_path).notes == ("pictures of other expressions, left out: 2",)
    assert "61_3_20170109.jpg" in read("utkface", tmp_path).notes[0]
    assert read("ferplus", tmp_path).notes[0].endswith("more than half of the votes, left out: 1")


def test_a_multiple_choice_question_is_answered_by_letter_in_any_order(tmp_path: Path) -> None:
    facexbench(tmp_path)
    case = read("facexbench", tmp_path).cases[0]
    assert case.target == 2 and len(case.images) == 2
    assert case.prompt([2, 0, 1, 3]).startswith("How many are sad? A. 1 B. 0 C. 2 D. 3 ")
    assert case.answers([2, 0, 1, 3]) == ["B", "C", "A", "D"]


def break_rafdb(root: Path) -> None:
    write(root / "EmoLabel/list_patition_label.txt", "test_0001.jpg 8")


def break_celeba(root: Path) -> None:
    celeba(root)
    write(root / "list_attr_celeba.txt", "1", " ".join(reversed(CELEBA_NAMES)))


def break_fairface(root: Path) -> None:
    write(root / "fairface_label_val.csv", "file,age,gender,race", "val/9.jpg,young,Male,Black")


def without_picture(root: Path) -> None:
    rafdb(root)
    (root / "Image/aligned/test_0001_aligned.jpg").unlink()


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("rafdb", lambda root: None, "'EmoLabel/list_patition_label.txt' or .* not found; there is no such folder"),
        ("rafdb", without_picture, "line 2: picture '.*test_0001_aligned.jpg' not found"),
        ("rafdb", break_rafdb, "line 1: label 7, expected 0 to 6 .Surprise, Fear"),
        (
            "fer2013",
            lambda root: write(root / "fer2013.csv", "emotion,Usage", "1,x"),
            "no column 'pixels'; found: emot",
        ),
        ("celeba", break_celeba, "line 2: expected the 40 attributes in their official order"),
        ("fairface", break_fairface, "line 2: age 'young', expected one of: 0-2"),
        ("utkface", lambda root: picture(root / "a.jpg"), "no picture is named AGE_GENDER_RACE_DATE"),
        ("affectnet8", fer2013, "no folder 'val_set'"),
    ],
)
def test_a_wrong_or_missing_file_is_named(
    tmp_path: Path, name: str, layout: Callable[[Path], None], message: str
) -> None:
    layout(tmp_path)
    with pytest.raises(DataError, match=message):
        read(name, tmp_path)


def test_sections_that_do_not_exist_list_the_others(tmp_path: Path) -> None:
    fairface(tmp_path)
    with pytest.raises(ConfigError, match="no section 'gendre'.*did you mean 'gender'"):
        read("fairface", tmp_path, sections=("gendre",))
    with pytest.raises(ConfigError, match="no split 'test'; known: val, train"):
        read("fairface", tmp_path, split="test")


def test_sections_of_facegpt4vision_have_labels_where_their_references_do(tmp_path: Path) -> None:
    def record(number: int, answer: str) -> dict[str, Any]:
        said = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": answer}]
        return {"id": str(number), "image": f"{number}.png", "conversations": said}

    answers = ["Yes, this is a human.", "No, there is no person.", "Yes.", "A person.", "I'm sorry, I can't tell."]
    content = {
        "Human or not": [record(number, answer) for number, answer in enumerate(answers)],
        "Posture ": [record(number, f"Sits upright, picture {number}.") for number in range(3)],
    }
    write(tmp_path / "by_section.json", json.dumps(content))
    faces = read("facegpt4vision", tmp_path, sections=("Human or not", "Posture"))
    assert labels(faces)[:5] == ["Yes", "No", "Yes", "Yes", "Sits upright, picture 0."]
    assert faces.cases[0].question == "Who?" and faces.cases[4].kind == "text"
    assert faces.notes == (
        "Human or not: references without a single label of 'human', left out: 1, of which declined to answer: 1",
    )
    assert read("facegpt4vision", tmp_path).sections == ["Human or not"]


def test_own_data_needs_an_image_and_a_label(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write(path, "image,answer,skin", "a.png,Happy,II", "b.png,Sad,V", "a.png,happy,II")
    faces = read("own", tmp_path, annotations=path, fields={"label": "answer"}, question="Mood?")
    assert labels(faces) == ["Happy", "Sad", "Happy"] and faces.cases[1].meta == {"skin": "V"}
    assert len(faces.limited(1, seed=0).cases) in (1, 2)
    (tmp_path / "classes").mkdir()
    for name in ("Happy", "Sad"):
        picture(tmp_path / "classes" / name / "a.png")
    folders = read("own", tmp_path / "classes", question="Mood?")
    assert labels(folders) == ["Happy", "Sad"] and Path(folders.cases[1].images[0]).is_file()
    with pytest.raises(ConfigError, match="no such column \\(did you mean 'skin'"):
        faces.check_columns(["skni"])
    with pytest.raises(DataError, match="line 2: column 'label' is missing or empty; found: image, answer, skin"):
        read("own", tmp_path, annotations=path, question="Mood?")
    with pytest.raises(DataError, match="has no column 'question'"):
        read("own", tmp_path, annotations=path, fields={"label": "answer"})
