"""Records become turns with the texts that checkpoints were trained on."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, Turn
from minigpt4.datasets import formats


def turns(name: str, record: dict[str, Any], prompts: tuple[str, ...] = (), seed: int = 0) -> tuple[Turn, ...]:
    result: tuple[Turn, ...] = registry.get("format", name)(record, prompts, Random(seed))
    return result


def talk(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)], **fields}


def test_every_answer_of_a_conversation_is_a_turn() -> None:
    record = talk("<image>\nWho?", "Ann.\nSmiling.", "How old?\n", "Thirty. ", image="a.png")
    assert turns("conversation", record) == (
        Turn(f"{IMAGE_PROMPT} Who? ", "Ann.\nSmiling."),
        Turn("How old?\n ", "Thirty. "),
    )


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("a\nb\n<image>", "a b"),
        ("<image>\na\n\nb", "a b"),
        ("a\n<image>\nb", "a b"),
        ("  a  b\r\n", "a  b"),
    ],
)
def test_a_newline_becomes_a_space_except_beside_the_image_tag(text: str, body: str) -> None:
    assert turns("conversation", talk(text, "yes", image="a.png"))[0].prompt == f"{IMAGE_PROMPT} {body} "


def test_several_images_keep_their_places_over_all_turns() -> None:
    record = talk("<image>\n<image>\nSame as", "No", "And <image>?", "Yes", images=["a", "b", "c"])
    prompts = [turn.prompt for turn in turns("conversation", record)]
    assert prompts == [f"{IMAGE_PROMPT} {IMAGE_PROMPT} Same as ", f"And {IMAGE_PROMPT}? "]


def test_several_images_without_tags_stand_in_front() -> None:
    record = talk("Compare", "No", images=["a", "b"])
    assert turns("conversation", record)[0].prompt == f"{IMAGE_PROMPT} {IMAGE_PROMPT} Compare "


def test_a_conversation_without_image_is_text_only() -> None:
    assert turns("conversation", talk("Hi\nyou", "Hello")) == (Turn("Hi you", "Hello"),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk("q", "a", "dangling", image="x"), "3 entries; the last question has no answer"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
            "position 0 is from 'gpt'",
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "q"}]}, "expected 'gpt'"),
        ({"conversations": [{"from": "human"}]}, "position 0 holds"),
        ({"question": "q", "answer": "a"}, "found: question, answer; .*'vqa'"),
        (talk("q", " ", image="x"), "answer at position 1 is empty"),
        (talk("<image> q", "a"), "has 0 images but 1 <image> tags"),
        (talk("<image> q", "a", images=["x", "y"]), "has 2 images but 1 <image> tags"),
        (talk("<image>\nq<image>", "a", image="x"), "has 1 images but 2 <image> tags"),
        (talk("q", "a", "<image> and <image>?", "b", image="x"), "has 1 images but 2 <image> tags"),
    ],
)
def test_a_conversation_that_would_train_wrong_answers_is_an_error(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        turns("conversation", record)


def test_a_caption_without_prompts_is_stage_one() -> None:
    record = {"image": "a", "caption": "A dog."}
    assert turns("caption", record) == (Turn(IMAGE_TAG, "A dog."),)
    whole = f"{IMAGE_PROMPT} Describe this image in detail."
    assert turns("caption", record, (whole,)) == (Turn(whole, "A dog."),)
    assert turns("caption", record, ("Describe.",)) == (Turn(f"{IMAGE_PROMPT} Describe. ", "A dog."),)
    with pytest.raises(DataError, match="has no image"):
        turns("caption", {"caption": "A dog."})


def test_vqa_fills_templates_and_draws_one_of_several_answers() -> None:
    record = {"image": "a", "question": "Is {<1><2><3><4>} red?", "answer": ["yes", "no"]}
    prompt = f"{IMAGE_PROMPT} [vqa] Is {{<1><2><3><4>}} red? "
    drawn = Counter(turns("vqa", record, ("[vqa] {}",), seed)[0] for seed in range(200))
    assert set(drawn) == {Turn(prompt, "yes"), Turn(prompt, "no")} and min(drawn.values()) > 60
    with pytest.raises(DataError, match="'Look' must hold '{}' once"):
        turns("vqa", record, ("Look",))


def test_vqa_without_image_is_text_only() -> None:
    assert turns("vqa", {"question": "2+2?", "answer": 4}) == (Turn("2+2?", "4"),)


def test_classification_asks_a_prompt_and_answers_the_label() -> None:
    assert turns("classification", {"image": "a", "label": "sad"}, ("Mood?",)) == (
        Turn(f"{IMAGE_PROMPT} Mood? ", "sad"),
    )
    with pytest.raises(DataError, match="needs prompts"):
        turns("classification", {"image": "a", "label": "sad"})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "a", "question": "q"}, "has no field 'answer'; found: image, question"),
        ({"question": "q", "answer": "  "}, "field 'answer' is empty"),
        ({"question": "q", "answer": None}, "field 'answer' holds None, expected text"),
        ({"question": "q", "answer": []}, r"field 'answer' holds \[\]"),
    ],
)
def test_a_field_that_cannot_be_trained_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        turns("vqa", record)


@pytest.mark.parametrize(
    ("text", "label"),
    [("Happy, a …", "Happy"), ("Contempt", "Contempt"), ("very sad face", "very"), ("Very angry, x", "Very angry")],
)
def test_the_emotion_is_the_text_before_the_comma_or_the_first_word(text: str, label: str) -> None:
    assert formats.emotion_label(text) == label


@pytest.mark.parametrize("text", ["", "  ", ", smiling"])
def test_a_text_without_emotion_is_an_error(text: str) -> None:
    with pytest.raises(DataError):
        formats.EmotionMapping(label_ratio=1.0)({"image": "a", "text": text}, (), Random(0))


def test_label_ratio_decides_between_label_and_description() -> None:
    record = {"image": "a", "text": "Happy, a\n  broad smile"}
    answers = Counter(formats.EmotionMapping(0.3)(record, (), Random(seed))[0].answer for seed in range(1000))
    assert set(answers) == {"Happy", "Happy, a broad smile"}
    assert 250 < answers["Happy"] < 350


def test_emotion_questions_keep_the_placeholder_and_their_numbers() -> None:
    label, description = formats.prompt_lines("emotion_label.txt"), formats.prompt_lines("emotion_description.txt")
    assert len(set(label)) == 20 and len(set(description)) == 50
    assert all("<EMOTION>" in question for question in label) and label[-1] == "<EMOTION>"
    assert "What is the <EMOTION> in this image?" in label


def test_question_diversity_uses_a_fixed_part_of_the_questions() -> None:
    record = {"image": "a", "text": "Happy"}
    asked = {formats.EmotionMapping(1.0, 0.1)(record, (), Random(seed))[0].prompt for seed in range(200)}
    assert len(asked) == 2
    assert len({formats.EmotionMapping(0.0, 0.0)(record, (), Random(seed))[0].prompt for seed in range(50)}) == 1


def test_a_mapping_with_prompts_answers_the_whole_text() -> None:
    assert turns("mapping", {"image": "a", "text": "Sad"}, ("Mood?",)) == (Turn(f"{IMAGE_PROMPT} Mood? ", "Sad"),)


def test_the_alignment_prompts_hold_the_published_line() -> None:
    lines = formats.prompt_lines("alignment.txt")
    assert len(lines) == 4 and "<Img><ImageHere></Img> Describe this image in detail." in lines
    assert all(IMAGE_TAG in line for line in lines)


@pytest.mark.parametrize(
    ("record", "layout", "name"),
    [
        (talk("q", "a"), "records", "conversation"),
        ({"image": "a", "caption": "c"}, "records", "caption"),
        ({"image": "a", "question": "q", "answer": "b"}, "records", "vqa"),
        ({"question": "q", "answer": "b"}, "records", "text"),
        ({"image": "a", "label": "b"}, "records", "classification"),
        ({"instances": []}, "records", "unnatural_instruction"),
        ({"messages": []}, "records", "messages"),
        ({"image": "a", "text": "b"}, "mapping", "mapping"),
    ],
)
def test_auto_recognises_a_record_and_says_why(record: dict[str, Any], layout: str, name: str) -> None:
    found, reason = formats.recognise(record, layout)
    assert found == name and reason


def test_auto_gives_up_with_the_columns() -> None:
    found = "no format fits the fields found: picture, emotion. Fields per format: conversation: conversations; mess"
    with pytest.raises(DataError, match=found):
        formats.recognise({"picture": "a", "emotion": "b"})
    assert turns("auto", {"question": "q", "answer": "a"}) == (Turn("q", "a"),)
