"""Every card yields the samples of the reference, where the reference is right.

Two differences are meant: newlines in a question become spaces instead of gluing words, and all answers of a
conversation are trained instead of the first.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from minigpt4.common.types import IMAGE_TAG, Sample, as_floats
from minigpt4.datasets.cards import CARD_ROOT, find_card, known_cards
from minigpt4.datasets.formats import emotion_label, prompt_lines
from tests.data_parts import GOLDEN, builder, json_file

EXPECTED = json.loads((GOLDEN / "datasets.json").read_text(encoding="utf-8"))
FOLDERS = json.loads((GOLDEN / "builders.json").read_text(encoding="utf-8"))
IMAGES = str(GOLDEN / "images")
GLUED = {
    "what's the mood?answer briefly": "what's the mood? answer briefly",
    "What's the mood?Answer": "What's the mood? Answer",
}


def samples(name: str, build_info: dict[str, Any], **keys: Any) -> list[Sample]:
    made = builder(name, {"build_info": build_info, **keys})
    assert made.check() == []
    dataset = made.build("train")
    return [dataset.sample(0, index, 7) for index in range(len(dataset))]


def pairs(ann: str) -> dict[str, str]:
    return {"ann_path": str(GOLDEN / "ann" / ann), "image_path": IMAGES}


def unglued(text: str) -> str:
    for glued, apart in GLUED.items():
        text = text.replace(glued, apart)
    return text


def assert_same_picture(sample: Sample, row: dict[str, Any]) -> None:
    image = as_floats(*sample.images)
    assert list(image.shape) == row["image"]["shape"]
    # Pillow 12 and 13 round some resized pixels by one step of 255 differently (86 of 9,408 in one of these pictures).
    step = 2e-4 * row["image"]["abs_sum"]
    assert float(image.double().sum()) == pytest.approx(row["image"]["sum"], abs=step)
    assert float(image.double().abs().sum()) == pytest.approx(row["image"]["abs_sum"], abs=step)


@pytest.mark.parametrize(
    ("name", "ann"),
    [
        ("llava_detail", "llava_detail.json"),
        ("llava_reason", "llava_detail.json"),
        ("sharegpt_detail", "sharegpt.json"),
    ],
)
def test_single_questions_equal_the_reference(name: str, ann: str) -> None:
    made = samples(name, pairs(ann))
    assert len(made) == EXPECTED[name]["len"]
    for sample, row in zip(made, EXPECTED[name]["rows"], strict=True):
        assert sample.turns[0].prompt == unglued(row["instruction_input"])
        assert sample.turns[0].answer == row["answer"]
        assert sample.sample_id == f"{name}/{row['image_id']}"
        assert_same_picture(sample, row)


@pytest.mark.parametrize("name", ["llava_conversation", "multitask_conversation"])
def test_conversations_equal_the_reference(name: str) -> None:
    for sample, row in zip(samples(name, pairs("llava_conversation.json")), EXPECTED[name]["rows"], strict=True):
        assert [turn.prompt for turn in sample.turns] == unglued(row["conv_q"]).split("!@#")
        assert "!@#".join(turn.answer for turn in sample.turns) == row["conv_a"]
        assert_same_picture(sample, row)


def test_every_answer_of_a_sharegpt_conversation_is_trained() -> None:
    first = samples("sharegpt_detail", pairs("llava_detail.json") | {"image_names": ["COCO_train2014_{id}.jpg"]})[0]
    assert [turn.answer for turn in first.turns] == ["A Man.\nHe looks SAD.", "No, he is not!", "One.  "]
    assert first.turns[2].prompt == "how many? "


def test_sections_equal_the_reference() -> None:
    sections = ["Facial Characteristics Long", " Pre-Prompt "]
    made = samples("gpt4visionface_detail", pairs("gpt4vision.json") | {"subsets_prompts": sections})
    for sample, row in zip(made, EXPECTED["gpt4visionface_detail"]["rows"], strict=True):
        assert (sample.turns[0].prompt, sample.turns[0].answer) == (row["instruction_input"], row["answer"])
        assert_same_picture(sample, row)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_emotions_have_the_labels_and_descriptions_of_the_reference(ratio: float) -> None:
    expected = EXPECTED[f"RealisticEmotions_detail_label_ratio_{ratio}"]
    made = samples("RealisticEmotions_detail", pairs("realistic_emotions.json") | {"label_ratio": ratio})
    questions = {f"<Img>{IMAGE_TAG}</Img> {line.lower().rstrip('.?')}" for line in prompt_lines("emotion_label.txt")}
    assert len(made) == len(expected["ann"]) > 0
    rows = expected["rows"][: len(made)]  # more rows are recorded than records
    for sample, entry, row in zip(made, expected["ann"], rows, strict=True):
        assert emotion_label(entry["emotion_desc"]) == entry["emotion_label"]
        answers = {0.0: {entry["emotion_desc"]}, 1.0: {entry["emotion_label"]}}
        assert sample.turns[0].answer in answers.get(ratio, {entry["emotion_desc"], entry["emotion_label"]})
        if ratio == 1.0:
            assert sample.turns[0].prompt.rstrip("? ") in questions
        assert_same_picture(sample, row)


def test_an_empty_emotion_is_reported_before_training() -> None:
    made = builder("RealisticEmotions_detail", {"build_info": pairs("re_empty.json")})
    assert len(made.check()) == 1 and "field 'text' is empty" in made.check()[0]


def test_alignment_captions_stay_as_written_and_get_the_prompts_of_the_model(tmp_path: Any) -> None:
    (tmp_path / "image").symlink_to(GOLDEN / "images")
    json_file(
        tmp_path / "filter_cap.json", json.loads((GOLDEN / "ann" / "cc_sbu_align.json").read_text(encoding="utf-8"))
    )
    block = {"build_info": {"storage": str(tmp_path)}}
    plain = builder("cc_sbu_align", block).build("train")
    asked = builder("cc_sbu_align", block, prompt_lines("alignment.txt"))
    assert asked.check() == [] and len(plain) == EXPECTED["cc_sbu_align"]["len"]
    for index, row in enumerate(EXPECTED["cc_sbu_align"]["rows"]):
        sample = plain.sample(0, index, 7)
        assert (sample.turns[0].prompt, sample.turns[0].answer) == (IMAGE_TAG, row["answer"])
        assert_same_picture(sample, row)
        assert asked.build("train").sample(0, index, 7).turns[0].prompt in prompt_lines("alignment.txt")


def test_text_instructions_equal_the_reference() -> None:
    made = samples("unnatural_instruction", {"ann_path": str(GOLDEN / "ann" / "unnatural.json")})
    for sample, row in zip(made, EXPECTED["unnatural_instruction"]["rows"], strict=True):
        assert (sample.turns[0].prompt, sample.turns[0].answer) == (row["instruction_input"], row["answer"])
        assert sample.images == ()


def test_cards_lie_in_the_folders_users_know() -> None:
    assert len(known_cards()) >= 11
    for name in known_cards():
        path = find_card(name)
        assert path is not None
        if name in FOLDERS:
            assert str(path.relative_to(CARD_ROOT.parent.parent)) == FOLDERS[name]["config"]["default"]
    assert find_card("no_such_set") is None


@pytest.mark.parametrize("name", known_cards())
def test_a_card_without_data_says_which_key_to_set(name: str) -> None:
    problems = builder(name, {}).check()
    assert problems and all(problem.startswith("build_info.") and "not found" in problem for problem in problems), (
        problems
    )


def test_the_same_draw_comes_from_the_same_seed_pass_and_index() -> None:
    dataset = builder("RealisticEmotions_detail", {"build_info": pairs("realistic_emotions.json")}).build("train")
    first = [dataset.sample(number, 0, 7).turns for number in range(20)]
    Random(0).random()
    assert first == [dataset.sample(number, 0, 7).turns for number in range(20)]
    assert len(set(first)) > 10
    assert first != [dataset.sample(number, 0, 8).turns for number in range(20)]
