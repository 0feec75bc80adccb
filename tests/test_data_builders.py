"""A YAML block alone makes a data set; what is wrong with it is said before any weight is loaded."""

from __future__ import annotations

import json
import logging
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.schema import DatasetConfig
from minigpt4.common.types import IMAGE_PROMPT, Turn, as_floats
from tests.data_parts import builder, faces, json_file


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    """A CSV of six faces with columns of its own."""
    names = faces(tmp_path, 6)
    rows = "".join(f"{name},Who?,face {number},p{number // 3}\n" for number, name in enumerate(names))
    (tmp_path / "faces.csv").write_text(f"file,q,label,person\n{rows}", encoding="utf-8")
    return {
        "format": "vqa",
        "build_info": {"ann_path": str(tmp_path / "faces.csv"), "image_path": str(tmp_path)},
        "fields": {"image": "file", "question": "q", "answer": "label"},
    }


def test_a_csv_with_columns_of_its_own_needs_yaml_only(table: dict[str, Any]) -> None:
    made = builder("mine", table)
    assert made.check() == []
    sample = made.build("train").sample(0, 4, 1)
    assert sample.turns == (Turn(f"{IMAGE_PROMPT} Who? ", "face 4"),)
    assert as_floats(sample.images[0]).shape == (3, 56, 56) and sample.sample_id == "mine/4"


def test_auto_says_in_the_log_what_it_took(table: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset = builder("mine", table | {"format": "auto"}).build("train")
    assert "dataset 'mine': table of 6 records with 'question' -> vqa" in caplog.text
    assert dataset.sample(0, 0, 1).turns[0].answer == "face 0"


def test_a_check_before_the_model_knows_the_size_alone(table: dict[str, Any]) -> None:
    @dataclass(frozen=True)
    class Planned:
        size: int
        mean: tuple[float, ...] = ()
        std: tuple[float, ...] = ()

    assert builder("mine", table, image=Planned(28)).check() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build_info": {"ann_path": ""}}, "build_info.ann_path is not set"),
        (
            {"build_info": {"an_path": "x"}},
            "build_info.an_path: unknown key (did you mean 'ann_path'?); allowed: ann_path",
        ),
        ({"build_info": {"ann_path": 5}}, "build_info.ann_path: found 5, expected text or a list of text"),
        ({"build_info": {"ann_path": "/path/to/faces.csv"}}, "build_info.ann_path: found the placeholder"),
        ({"build_info": {"ann_path": "<your file>"}}, "build_info.ann_path: found the placeholder"),
        ({"build_info": {"ann_path": "{folder}/face.csv"}}, "face.csv' not found (did you mean 'faces.csv'?)"),
        ({"build_info": {"image_path": "{folder}/pictures"}}, "pictures' not found"),
        ({"build_info": {"image_path": "{folder}/faces.csv"}}, "is a file, expected a directory"),
        ({"build_info": {"image_path": ""}}, "build_info.image_path is not set, but the record has an image"),
        (
            {"fields": {"answer": "lable"}},
            "fields.answer: no column 'lable' (did you mean 'label'?); columns: file, q,",
        ),
        ({"format": "classification"}, "needs prompts"),
        ({"format": "conversation"}, "has no 'conversations'"),
        ({"prompts": ["no place for the question"]}, "must hold '{}' once"),
        ({"image_backend": "quick"}, "image_backend: found 'quick', allowed: exact, fast"),
        ({"on_error": "skip"}, "on_error: skip needs max_bad_fraction > 0"),
        ({"val": {"ann_path": "{folder}/val.csv"}}, "val.ann_path: '{folder}/val.csv' not found"),
        ({"prompts_file": "{folder}/none.txt"}, "none.txt' not found"),
        ({"vis_processor": {"train": {"name": "identity"}}}, "vis_processor: 'identity' is of the other kind"),
    ],
)
def test_a_mistake_in_the_block_is_one_message(
    table: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    problems = builder("mine", table).check()
    assert len(problems) == 1 and message.replace("{folder}", str(tmp_path)) in problems[0], problems


def test_an_image_that_is_missing_is_found_before_training(table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "5.png").unlink()
    problems = builder("mine", table).check()
    assert len(problems) == 1 and "faces.csv, line 7: image '5.png' not found in" in problems[0]
    assert builder("mine", table | {"on_error": "skip", "max_bad_fraction": 0.5}).check() == []


def test_an_image_column_that_is_not_mapped_is_found(table: dict[str, Any]) -> None:
    del table["fields"]["image"]
    (problem,) = builder("mine", table).check()
    assert "records name no image; write fields: {image: one of file, q, label, person}" in problem


def test_build_alone_refuses_a_wrong_block(table: dict[str, Any]) -> None:
    table["build_info"]["an_path"] = "x"
    with pytest.raises(ConfigError, match="dataset 'mine': build_info.an_path: unknown key"):
        builder("mine", table).build("train")


def test_prompts_come_from_the_block_or_its_file(table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("[vqa] {}\n\n", encoding="utf-8")
    dataset = builder("mine", table | {"prompts_file": str(tmp_path / "prompts.txt")}).build("train")
    assert dataset.sample(0, 0, 1).turns[0].prompt == f"{IMAGE_PROMPT} [vqa] Who? "
    dataset = builder("mine", table | {"prompts": ["{} Answer briefly."]}, ("never used",)).build("train")
    assert dataset.sample(0, 0, 1).turns[0].prompt == f"{IMAGE_PROMPT} Who? Answer briefly. "


def test_text_is_processed_where_the_block_says(table: dict[str, Any]) -> None:
    block = table | {"text_processor": {"train": {"name": "blip_caption"}}, "prompts": ["{} OK."]}
    assert builder("mine", block).build("train").sample(0, 0, 1).turns == (Turn(f"{IMAGE_PROMPT} who? ok ", "face 0"),)
    none = builder("mine", block | {"process_text": []}).build("train")
    assert none.sample(0, 0, 1).turns[0].prompt == f"{IMAGE_PROMPT} Who? OK. "


def test_all_records_of_one_group_fall_on_one_side(tmp_path: Path) -> None:
    names = faces(tmp_path, 40)
    records = [
        {"image": name, "question": f"{n}?", "answer": "a", "person": i % 7}
        for i, name in enumerate(names)
        for n in "abc"
    ]
    info = {"ann_path": json_file(tmp_path / "a.json", records), "image_path": str(tmp_path)}
    for group, key in (("image", "image"), ("person", "person")):
        made = builder("mine", {"format": "vqa", "build_info": info, "val": {"fraction": 0.3, "group_by": group}})
        sides = {}
        for split in ("train", "val"):
            dataset = made.build(split)
            sides[split] = {dataset.record(index)[key] for index in range(len(dataset))}  # type: ignore[attr-defined]
        assert not sides["train"] & sides["val"]
        assert sides["train"] | sides["val"] == {record[key] for record in records}
    with pytest.raises(DataError, match="val.group_by 'video' is no field of: image, question"):
        builder("mine", {"build_info": info, "val": {"fraction": 0.3, "group_by": "video"}}).build("val")
    with pytest.raises(DataError, match="leaves no sample for split 'val'"):
        builder("mine", {"build_info": info, "val": {"fraction": 1e-9}}).build("val")


def test_validation_may_have_a_file_and_processors_of_its_own(table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("file,q,label\n0.png,WHO?,x\n", encoding="utf-8")
    block = table | {"val": {"ann_path": str(tmp_path / "val.csv")}}
    block["text_processor"] = {"train": {"name": "identity"}, "eval": {"name": "blip_caption"}}
    made = builder("mine", block)
    assert made.check() == []
    assert len(made.build("train")) == 6 and len(made.build("val")) == 1
    assert made.build("val").sample(0, 0, 1).turns[0].prompt == f"{IMAGE_PROMPT} who? "


def test_a_split_that_was_not_asked_for_is_an_error(table: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no val split; write val:"):
        builder("mine", table).build("val")


def test_an_error_while_training_names_data_set_file_and_line(table: dict[str, Any], tmp_path: Path) -> None:
    dataset = builder("mine", table).build("train")
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"dataset 'mine', .*faces.csv, line 4: image '.*2.png' cannot be read"):
        dataset.sample(0, 2, 1)


def test_skip_takes_the_next_sample_and_counts(
    table: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = builder("mine", table | {"on_error": "skip", "max_bad_fraction": 0.34}).build("train")
    for number in (2, 5):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    assert [dataset.sample(0, 2, 1).sample_id, dataset.sample(0, 5, 1).sample_id] == ["mine/3", "mine/0"]
    assert dataset.sample(0, 2, 1).turns == dataset.sample(0, 3, 1).turns
    assert caplog.text.count("skipped") == 2 and "line 4" in caplog.text
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3 of 6 samples cannot be read, max_bad_fraction 0.34 allows 2.*0.png"):
        dataset.sample(0, 0, 1)


def test_pictures_are_opened_when_asked_for_and_records_are_not_read_again(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened a picture"))
    dataset = builder("mine", table).build("train")
    monkeypatch.undo()
    (tmp_path / "faces.csv").unlink()
    assert dataset.sample(0, 1, 1).turns[0].answer == "face 1"


def test_a_data_set_travels_to_loader_workers(table: dict[str, Any]) -> None:
    dataset = builder("mine", table).build("train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.sample(0, 3, 1).turns == dataset.sample(0, 3, 1).turns
    assert copy.fingerprint() == dataset.fingerprint()


def test_image_names_are_tried_in_order(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train2017" / "7.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "COCO_8.jpg")
    records = [{"id": str(number), "question": "q", "answer": "a"} for number in (7, 8)]
    info = {
        "ann_path": json_file(tmp_path / "a.json", records),
        "image_path": str(tmp_path),
        "image_names": ["COCO_{id}.jpg", "{image}", "train2017/{id}.jpg"],
    }
    made = builder("mine", {"format": "vqa", "build_info": info})
    assert made.check() == [] and len(made.build("train").sample(0, 0, 1).images) == 1
    (tmp_path / "COCO_8.jpg").unlink()
    assert "image 'COCO_8.jpg' not found" in made.check()[0] and "also tried: train2017/8.jpg" in made.check()[0]


def test_several_images_of_a_record_are_loaded_in_order(tmp_path: Path) -> None:
    names = faces(tmp_path, 3)
    talk = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "No"}]
    info = {
        "ann_path": json_file(tmp_path / "a.json", [{"images": names[1:], "conversations": talk}]),
        "image_path": str(tmp_path),
    }
    sample = builder("sharegpt_detail", {"build_info": info}).build("train").sample(0, 0, 1)
    assert sample.turns[0].prompt == f"{IMAGE_PROMPT} or {IMAGE_PROMPT} ? "
    assert [float(as_floats(image)[0, 0, 0]) for image in sample.images] == sorted(
        float(as_floats(image)[0, 0, 0]) for image in sample.images
    )
    assert len(sample.images) == 2


def test_an_unknown_section_and_an_empty_choice_are_found_before_training(tmp_path: Path) -> None:
    info = {"ann_path": json_file(tmp_path / "a.json", {"Gender": [{"id": 1}]}), "image_path": str(tmp_path)}
    made = builder("gpt4visionface_detail", {"build_info": info | {"subsets_prompts": ["Gander"]}})
    assert "no section 'Gander' (did you mean 'Gender'?); known: Gender" in made.check()[0]
    made = builder("gpt4visionface_detail", {"build_info": info | {"subsets_prompts": []}})
    assert made.check() == ["build_info.subsets_prompts is not set"]


def test_the_other_published_name_of_a_file_is_accepted(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\n[vqa] Q"}, {"from": "gpt", "value": "A"}]
    json_file(tmp_path / "multitask_conversation.json", [{"id": "0", "conversations": talk}])
    faces(tmp_path, 1)
    info = {
        "ann_path": str(tmp_path / "multi_task_conversation.json"),
        "image_path": str(tmp_path),
        "image_names": ["{id}.png"],
    }
    made = builder("multitask_conversation", {"build_info": info})
    assert made.check() == [] and made.build("train").sample(0, 0, 1).turns == (Turn(f"{IMAGE_PROMPT} [vqa] Q ", "A"),)


def test_a_picture_that_is_none_is_told_by_the_check(table: dict[str, Any], tmp_path: Path) -> None:
    first = Path(table["build_info"]["image_path"]) / (tmp_path / "faces.csv").read_text().splitlines()[1].split(",")[0]
    first.write_bytes(b"not a picture")
    (message,) = builder("mine", table).check()
    assert "faces.csv, line 2" in message and "cannot be read" in message


def test_the_order_and_unit_of_boxes_are_told_by_the_block(tmp_path: Path) -> None:
    faces(tmp_path, 1)  # 9 x 7 pixels
    records = [{"image": "0.png", "phrase": "mouth", "corners": [0.29, 0.5, 0.57, 1.0]}]
    block = {
        "format": "refer",
        "build_info": {"ann_path": json_file(tmp_path / "a.json", records), "image_path": str(tmp_path)},
        "fields": {"box": "corners"},
    }
    made = builder("mine", block | {"box_format": "xyxy", "box_unit": "0..1"})
    assert made.check() == []
    assert made.build("train").sample(0, 0, 1).turns[0].answer == "{<29><50><57><100>}"
    (problem,) = builder("mine", block).check()
    assert "a.json, record 0: field 'box' holds" in problem and "is it box_unit: 0..1?" in problem
    with pytest.raises(ConfigError, match="box_unit must be one of pixels, 0..1, 0..100; got '0..10'"):
        DatasetConfig(box_unit="0..10")


def test_phrases_with_boxes_pass_through_unharmed(tmp_path: Path) -> None:
    faces(tmp_path, 1)
    asked, said = "[refer] <p>left  eye</p> near {<1><2><30><40>}", "<p>eye</p> {<1><2><3><4>}<delim>{<5><6><7><8>}"
    talk = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": said}]
    info = {
        "ann_path": json_file(tmp_path / "a.json", [{"image": "0.png", "conversations": talk}]),
        "image_path": str(tmp_path),
    }
    sample = builder("mine", {"build_info": info}).build("train").sample(0, 0, 1)
    assert sample.turns == (Turn(f"{IMAGE_PROMPT} {asked} ", said),)


def test_a_mistake_far_inside_a_file_is_told_by_the_check(tmp_path: Path) -> None:
    names = faces(tmp_path, 3)
    records = [{"image": names[number % 3], "question": "q", "answer": "a"} for number in range(1000)]
    info = {"ann_path": str(tmp_path / "a.json"), "image_path": str(tmp_path)}
    for change, message in (
        ({"answer": " "}, "a.json, record 501: field 'answer' is empty"),
        ({"image": "far.png"}, "a.json, record 501: image 'far.png' not found"),
        ({"image": 7}, "a.json, record 501: field 'image' holds 7, expected a file name"),
    ):
        json_file(tmp_path / "a.json", [*records[:501], records[501] | change, *records[502:]])
        (problem,) = builder("mine", {"build_info": info}).check()
        assert message in problem


def test_a_long_file_is_checked_in_a_second(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWho is it?"}, {"from": "gpt", "value": "Someone who smiles. " * 5}]
    names = faces(tmp_path, 1)
    json_file(tmp_path / "a.json", [{"image": names[0], "conversations": talk}] * 50_000)
    made = builder("mine", {"build_info": {"ann_path": str(tmp_path / "a.json"), "image_path": str(tmp_path)}})
    made.read("train")  # type: ignore[attr-defined]  # parsed once per process
    begin = time.process_time()
    assert made.check() == []
    assert time.process_time() - begin < 4  # under one second on an idle core


def test_the_fast_backend_reads_the_same_samples_with_boxes_of_the_stored_size(tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((640, 480)).convert("RGB").save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    records = [{"image": name, "phrase": "a cup", "box": [64, 48, 64, 48]} for name in ("a.jpg", "b.jpg")]
    info = {"ann_path": json_file(tmp_path / "a.json", records), "image_path": str(tmp_path)}
    exact, fast = (
        builder("mine", {"format": "refer", "build_info": info, "image_backend": backend}).build("train")
        for backend in ("exact", "fast")
    )
    one, other = exact.sample(0, 0, 1), fast.sample(0, 0, 1)
    assert one.turns == other.turns and "{<10><10><20><20>}" in other.turns[0].answer
    assert (as_floats(one.images[0]) - as_floats(other.images[0])).abs().max() < 0.02
    for dataset in (exact, fast):
        with pytest.raises(DataError, match=r"record 1: image '.*b\.jpg' cannot be read"):
            dataset.sample(0, 1, 1)
