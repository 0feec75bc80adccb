"""Every card of MiniGPT-v2's third stage reads the public files as they lie on users' disks."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from minigpt4.common.errors import DataError
from minigpt4.common.types import IMAGE_PROMPT, Sample, Turn, as_floats
from minigpt4.datasets import layouts
from minigpt4.datasets.cards import find_card
from minigpt4.datasets.formats import prompt_lines
from tests.data_parts import builder
from tests.published_parts import SIZE, coco_name, data_folder, dump, picture, refs, visual_genome

PATH_KEYS = ("ann_path", "image_path", "data_dir")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return data_folder(tmp_path)


def block(name: str, root: Path, **info: Any) -> dict[str, Any]:
    """The card's own ``build_info`` below ``root``."""
    card = find_card(name)
    assert card is not None
    given = yaml.safe_load(card.read_text(encoding="utf-8"))["datasets"][name]["build_info"]
    for key in PATH_KEYS:
        if key in given:
            value = given[key]
            given[key] = [str(root / item) for item in value] if isinstance(value, list) else str(root / value)
    return {"build_info": {**given, **info}}


def samples(name: str, root: Path, passes: int = 1, **info: Any) -> list[Sample]:
    made = builder(name, block(name, root, **info))
    assert made.check() == []
    dataset = made.build("train")
    return [dataset.sample(number, index, 7) for number in range(passes) for index in range(len(dataset))]


def turn(sample: Sample) -> Turn:
    (only,) = sample.turns
    return only


def asked(template: str, text: str) -> str:
    return f"{IMAGE_PROMPT} {template.replace('{}', text)} "


@pytest.mark.parametrize("name", ["refcoco", "refcocop", "refcocog"])
def test_a_phrase_is_answered_by_the_box_of_its_object(name: str, data: Path) -> None:
    made = samples(name, data, passes=30)
    prompts = {asked(line, phrase) for line in prompt_lines("refer.txt") for phrase in ("tall red mug", "the mug")}
    assert len(prompts) == 14 and {turn(sample).prompt for sample in made} <= prompts
    assert len({turn(sample).prompt for sample in made}) > 10  # templates and sentences are both drawn
    assert {turn(sample).answer for sample in made} == {"{<0><33><24><98>}", "{<93><2><100><6>}"}  # one is clamped
    assert {sample.sample_id for sample in made} == {f"{name}/0", f"{name}/1"}
    assert as_floats(made[0].images[0]).shape == (3, 56, 56)


@pytest.mark.parametrize("name", ["invrefcoco", "invrefcocop", "invrefcocog"])
def test_a_box_is_answered_by_a_phrase_of_its_object(name: str, data: Path) -> None:
    made = samples(name, data, passes=30)
    boxes = ("{<0><33><24><98>}", "{<93><2><100><6>}")
    assert {turn(sample).prompt for sample in made} <= {
        asked(line, box) for line in prompt_lines("identify.txt") for box in boxes
    }
    assert {turn(sample).answer for sample in made} == {"tall red mug", "the mug"}


def test_the_val_split_of_references_is_held_out_on_request(data: Path) -> None:
    given = block("refcoco", data) | {"val": {"ann_path": str(data / "refcoco_annotations")}}
    made = builder("refcoco", given)
    assert made.check() == [] and len(made.build("train")) == 2
    assert turn(made.build("val").sample(0, 0, 1)).answer == "{<0><0><10><10>}"


def test_references_may_be_json_and_must_not_run_code(data: Path) -> None:
    folder = data / "refcoco_annotations" / "refcoco"
    path = folder / "refs(unc).p"
    content = pickle.loads(path.read_bytes())

    class Harm:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(data / "harm"),)

    for harmful in ([Harm()], content + [Harm()]):
        path.write_bytes(pickle.dumps(harmful))
        (problem,) = builder("refcoco", block("refcoco", data)).check()
        assert "the pickle asks for 'posix.mkdir'" in problem and not (data / "harm").exists()
    path.write_bytes(pickle.dumps(content)[:50])
    assert "not a readable pickle" in builder("refcoco", block("refcoco", data)).check()[0]
    path.unlink()
    assert "refs(unc).p' not found" in builder("refcoco", block("refcoco", data)).check()[0]
    dump(path.with_suffix(".json"), content)
    assert len(samples("refcoco", data)) == 2


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'raw'\np2\nVna\\u00efve\np3\nsS'n'\np4\nL7L\nsa.")  # [{'raw': u'naïve', 'n': 7L}]
    assert layouts.read_plain_pickle(path) == [{"raw": "naïve", "n": 7}]


def test_a_field_that_references_lack_is_named_with_its_place(data: Path) -> None:
    path = data / "refcoco_annotations" / "refcoco" / "refs(unc).p"
    content = pickle.loads(path.read_bytes())
    del content[1]["sentences"]
    path.write_bytes(pickle.dumps(content))
    (problem,) = builder("refcoco", block("refcoco", data)).check()
    assert "refs(unc).p, reference 1: 'sentences' is missing" in problem


def test_a_box_of_three_numbers_is_named_with_its_place(data: Path) -> None:
    path = data / "refcoco_annotations" / "refcoco" / "instances.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"][1]["bbox"].pop()
    dump(path, content)
    (problem,) = builder("refcoco", block("refcoco", data)).check()
    assert "refs(unc).p, reference 1: not of the published layout: not enough values" in problem


def test_small_regions_with_a_text_are_trained_and_a_picture_without_regions_is_no_mistake(data: Path) -> None:
    made = samples("refvg", data)
    assert [turn(sample).answer for sample in made] == ["{<37><13><45><28>}", "{<0><98><11><100>}"]
    assert [sample.sample_id for sample in made] == ["refvg/10", "refvg/12"]
    assert all("blue door handle" in turn(sample).prompt for sample in made)


def test_a_region_of_an_unknown_picture_is_an_error(tmp_path: Path) -> None:
    visual_genome(tmp_path)
    dump(tmp_path / "image_data.json", [])
    (problem,) = builder("refvg", {"build_info": {"data_dir": str(tmp_path)}}).check()
    assert "region_descriptions.json, picture 1: not of the published layout: image 1 is not described" in problem


def test_flickr_texts_stay_as_they_are(data: Path) -> None:
    grounded = turn(samples("flickr_grounded_caption", data)[0])
    assert grounded.prompt in {asked(line, "") for line in prompt_lines("grounding.txt")}
    assert grounded.answer == "<p>A boy</p> {<10><12><55><99>} holds <p>a kite</p> {<50><2><80><30>} ."
    assert turn(samples("flickr_CaptionToPhrase", data)[0]) == Turn(
        asked("[detection] {}", "A Boy, a kite."), "<p>A Boy</p> {<10><12><55><99>}"
    )
    assert turn(samples("flickr_ObjectToPhrase", data)[0]) == Turn(
        asked("[detection] {}", "Two boys."), "<p>Two boys.</p> {<10><12><55><99>}<delim>{<60><12><90><99>}"
    )


@pytest.mark.parametrize(
    ("name", "answer"), [("coco_caption", "a woman reads"), ("textcaps_caption", "a sign that says open")]
)
def test_short_captions_are_asked_for_and_cleaned(name: str, answer: str, data: Path) -> None:
    made = samples(name, data, passes=80)
    assert len(made) == 80  # of COCO's two captions that of val2014 is left out
    assert {turn(sample).prompt for sample in made} == {asked(line, "") for line in prompt_lines("caption.txt")}
    assert {turn(sample).answer for sample in made} == {answer}


@pytest.mark.parametrize(
    ("name", "count", "question", "answers"),
    [
        ("coco_vqa", 2, "what is on the table?", {"mug", "cup"}),
        ("ok_vqa", 1, "what is on the table?", {"mug", "cup"}),
        ("aok_vqa", 1, "why is the mug hot?", {"hot tea"}),
        ("gqa", 1, "is the sky dark?", {"yes"}),
        ("ocrvqa", 2, "", {"j doe", "birds"}),
    ],
)
def test_questions_are_cleaned_and_their_templates_are_not(
    name: str, count: int, question: str, answers: set[str], data: Path
) -> None:
    made = samples(name, data, passes=20)
    assert len(made) == 20 * count and {turn(sample).answer for sample in made} == answers
    questions = [question] if question else ["who wrote it?", "what title?"]
    assert {turn(sample).prompt for sample in made} == {
        asked(line, q) for line in prompt_lines("vqa.txt") for q in questions
    }


def test_answers_are_drawn_as_often_as_people_gave_them(data: Path) -> None:
    drawn = Counter(turn(sample).answer for sample in samples("ok_vqa", data, passes=300))
    assert drawn["mug"] + drawn["cup"] == 300 and 170 < drawn["mug"] < 230


@pytest.mark.parametrize(
    "name", ["train/{0}", "train2014/{0}", "val2014/{1}", "train2017/{2}", "val2017/{2}", "{0}", "{1}", "{2}"]
)
@pytest.mark.parametrize("dataset", ["aok_vqa", "refcoco"])
def test_a_picture_of_coco_is_found_under_each_of_its_names(name: str, dataset: str, tmp_path: Path) -> None:
    root = data_folder(tmp_path)
    images = tmp_path / "elsewhere"
    numbers = (44,) if dataset == "aok_vqa" else (42, 43)
    for number in numbers:
        names = coco_name(number), coco_name(number, "val2014"), f"{number:012d}.jpg"
        picture(images / name.format(*names))
    assert len(samples(dataset, root, image_path=str(images))) == len(numbers)


def test_a_missing_picture_stops_unless_it_may_be_skipped(data: Path) -> None:
    (data / "coco" / "images" / "val2014" / coco_name(43, "val2014")).unlink()
    given = block("coco_vqa", data)
    (problem,) = builder("coco_vqa", given).check()
    assert "vqa_val.json, record 0: image" in problem and "not found" in problem
    made = builder("coco_vqa", given | {"on_error": "skip", "max_bad_fraction": 0.5})
    assert made.check() == [] and made.build("train").sample(0, 1, 0).passed_over


def test_files_are_named_as_lavis_names_them(data: Path) -> None:
    files = [str(data / "vqav2" / name) for name in ("vqa_train.json", "vqa_val.json")]
    url = "https://example.org/vqa.json"
    info = {"images": {"storage": str(data / "coco" / "images")}}
    for part, count in (
        ({"storage": files, "url": [url, url]}, 2),
        ({"storage": files[0], "url": url}, 1),
        ({"url": files[:1], "storage": [str(data / "copy.json")]}, 1),
        ({"url": files[0]}, 1),
    ):
        made = builder("coco_vqa", {"build_info": {**info, "annotations": {"train": part}}})
        assert made.check() == [] and len(made.build("train")) == count
    for part, message in (
        ({"storage": "none.json", "url": url}, f"'none.json' not found; download it from {url}"),
        ({"storage": files, "url": [url]}, "1 url, but 2 storage"),
        ({}, "needs storage"),
    ):
        (problem,) = builder("coco_vqa", {"build_info": {**info, "annotations": {"train": part}}}).check()
        assert message in problem
    (problem,) = builder(
        "ok_vqa", {"build_info": {"annotations": {"train": {"storage": files[0]}}, "images": {"storage": "no"}}}
    ).check()
    assert problem == "build_info.images.storage: 'no' not found"
    (problem,) = builder("refcoco", block("refcoco", data, image_path="no")).check()
    assert problem == "build_info.image_path: 'no' not found"
    (problem,) = builder("ok_vqa", {"build_info": {"images": "x"}}).check()
    assert problem == "build_info.images: found 'x', expected a mapping"


def test_gqa_is_read_as_stanford_publishes_it(data: Path) -> None:
    question = {"imageId": "1000042", "question": "Is the sky dark?", "answer": "no", "semantic": []}
    dump(data / "gqa" / "train_balanced_questions.json", {"0042": question})
    (sample,) = samples("gqa", data)
    assert turn(sample).answer == "no" and sample.sample_id == "gqa/0042"


def test_a_lavis_path_of_another_year_still_finds_the_picture(data: Path) -> None:
    path = data / "aokvqa" / "aokvqa_v1p0_train.json"
    (record,) = json.loads(path.read_text(encoding="utf-8"))
    dump(path, [record | {"image": "val2017/000000000044.jpg"}])
    assert len(samples("aok_vqa", data)) == 1


def test_only_captions_of_the_chosen_pictures_are_used(data: Path) -> None:
    (problem,) = builder("coco_caption", block("coco_caption", data, image_contains="test2015")).check()
    assert "no record's image holds 'test2015' (build_info.image_contains)" in problem


def test_books_of_other_splits_stay_out_and_uneven_lists_are_an_error(data: Path) -> None:
    given = block("ocrvqa", data)
    path = data / "ocrvqa" / "dataset.json"
    picture(data / "ocrvqa" / "images" / "002.gif")
    held_out = builder("ocrvqa", given | {"val": {"ann_path": str(path)}})
    assert held_out.check() == [] and held_out.build("val").sample(0, 0, 0).sample_id == "ocrvqa/002"
    books = json.loads(path.read_text(encoding="utf-8"))
    books["001"]["answers"].pop()
    dump(path, books)
    (problem,) = builder("ocrvqa", given).check()
    assert "dataset.json, book '001': 2 questions, but 1 answers" in problem


def test_a_box_is_measured_on_the_picture_as_it_is_stored(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", SIZE)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown upright, turn by 90 degrees
    Image.new("RGB", SIZE).save(tmp_path / "b.jpg", exif=turned)
    rows = "picture,what,where\n" + "".join(f'{name}.jpg,mug,"64, 48, 64, 48"\n' for name in "ab")
    (tmp_path / "boxes.csv").write_text(rows, encoding="utf-8")
    given = {
        "format": "refer",
        "build_info": {"ann_path": str(tmp_path / "boxes.csv"), "image_path": str(tmp_path)},
        "fields": {"image": "picture", "phrase": "what", "box": "where"},
    }
    made = builder("mine", given)
    assert made.check() == []
    assert {turn(made.build("train").sample(0, n, 0)).answer for n in (0, 1)} == {"{<10><10><20><20>}"}


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([1, 2, 3], "field 'box' holds .*expected x, y, width, height"),
        (None, "field 'box' holds None"),
        ([700, 0, 5, 5], "covers nothing of a picture of 640 x 480"),
    ],
)
def test_a_box_that_cannot_be_trained_is_told_before_training(tmp_path: Path, box: Any, message: str) -> None:
    picture(tmp_path / "a.jpg")
    info = {"ann_path": str(dump(tmp_path / "a.json", [{"image": "a.jpg", "phrase": "mug", "box": box}]))}
    (problem,) = builder("mine", {"format": "identify", "build_info": info | {"image_path": str(tmp_path)}}).check()
    with pytest.raises(DataError, match=message):
        raise DataError(problem)


def test_objects_outside_their_picture_are_left_out(tmp_path: Path) -> None:
    refs(tmp_path / "refcoco", "unc")
    path = tmp_path / "refcoco" / "instances.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"][0]["bbox"] = [640, 0, 10, 10]
    dump(path, content)
    found = layouts.read_refs([tmp_path / "refcoco" / "refs(unc).p", path], "train")
    assert [record["id"] for record in found] == [1]


@pytest.mark.parametrize(
    ("name", "count", "literals"),
    [
        ("caption", 17, ("[caption] A short image caption:",)),
        ("refer", 7, ("[refer] {}", "[refer] give me the location of {}")),
        ("identify", 7, ("[identify] {}", "[identify] what is it in {}")),
        ("vqa", 2, ("[vqa] {}", "[vqa] Based on the image, respond to this question with a short answer: {}")),
        ("grounding", 4, ("[grounding] please describe this image in details",)),
        ("detection", 1, ("[detection] {}",)),
    ],
)
def test_question_lists_hold_the_published_lines(name: str, count: int, literals: tuple[str, ...]) -> None:
    lines = prompt_lines(f"{name}.txt")
    assert len(set(lines)) == len(lines) == count and set(literals) <= set(lines)
    assert all(line.startswith(f"[{name}]") for line in lines)
    assert {line.count("{}") for line in lines} == {0 if name in ("caption", "grounding") else 1}
