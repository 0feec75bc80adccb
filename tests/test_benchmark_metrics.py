"""Scores of the published benchmarks, on values measured with the published scripts."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt4.common.errors import DataError
from minigpt4.metrics.grounding import answered_corners, begins_with_box, is_located, overlap, refer_text
from minigpt4.metrics.vqa import (
    CONTRACTIONS,
    in_common_words,
    vizwiz_score,
    vqa_accuracy,
    vqa_score,
    without_punctuation,
)

BOX, SIZE = [3.24, 159.31, 156.4, 312.81], (640, 480)


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, start=1)]


def test_overlap_counts_both_edge_pixels() -> None:
    assert overlap((0, 0, 9, 9), (5, 5, 14, 14)) == pytest.approx(25 / 175)
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10), extra=0) == pytest.approx(50 / 150)
    assert overlap((9, 9, 0, 0), (9, 9, 0, 0), extra=0) in (0, 1) and overlap((1, 1, 0, 0), (1, 1, 0, 0)) == 0


def test_the_percents_of_a_true_box_are_located() -> None:
    assert is_located("{<0><33><24><98>}", BOX, SIZE)
    assert answered_corners("{<0><33><24><98>}", SIZE) == pytest.approx((0, 158.4, 153.6, 470.4))
    assert is_located("{<0><330><240><980>}", BOX, SIZE, resolution=1000)


@pytest.mark.parametrize(
    "answer",
    [
        "{<0><33><24><98>}<delim>{<0><33><24><98>}",
        "{<0><33><24><98>}2",
        "{<0><33><24>}",
        "",
        "person",
        "{<50><33><90><98>}",
    ],
)
def test_a_second_box_another_number_or_none_is_wrong(answer: str) -> None:
    assert not is_located(answer, BOX, SIZE)


def test_an_overlap_of_exactly_a_half_is_wrong() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 19, 9)) == 0.5
    assert not is_located("{<0><0><9><9>}", [0, 0, 19, 9], (100, 100))


def test_only_an_answer_that_begins_with_a_box_is_kept() -> None:
    assert begins_with_box(refer_text(" {<1> <2><3> <100>} a<unk> "))
    assert refer_text(" {<1> <2>} a <unk>b") == "{<1><2>}ab"
    for text in ("a{<1><2><3><4>}", "{<1><2><3><1000>}", "{<-1><2><3><4>}", "{<1><2><3>}"):
        assert not begins_with_box(text)


def test_punctuation_is_removed_as_the_official_scorer_does() -> None:
    assert without_punctuation("2.5 a.b U.S. 3.") == "2.5 ab US 3"
    assert without_punctuation("red-blue") == "red blue"  # nothing beside a space
    assert without_punctuation("red- blue-green") == "red bluegreen"  # one beside a space: all go
    assert without_punctuation("1,000 red-blue") == "1000 redblue"  # a number with a comma: all marks go


def test_words_are_evened_out() -> None:
    assert in_common_words("The two  men dont see None of an Apple") == "2 men don't see 0 of apple"
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["couldntve".replace("tve", "t've")] == "couldn't've" and CONTRACTIONS["twas"] == "'twas"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"


def test_vqa_accuracy_leaves_one_person_out_at_a_time() -> None:
    assert vqa_score("cat", people(*["cat"] * 10)) == 1.0
    three = people("cat", "cat", "cat", *["dog"] * 7)
    assert vqa_score("Cat.", three) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_score("a cat", people("the cat", "cat", *["dog"] * 8)) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_score("cat", people(*["dog"] * 10)) == 0.0


def test_references_that_agree_are_not_evened_out() -> None:
    assert vqa_score("a cat", people(*["cat"] * 10)) == 0.0
    assert vqa_score("cat\n", people(*[" cat"] * 10)) == 1.0


def test_vqa_accuracy_is_told_by_type_and_needs_the_same_questions() -> None:
    annotations = [
        {"question_id": 1, "question_type": "what", "answer_type": "other", "answers": people(*["cat"] * 10)},
        {"question_id": 2, "question_type": "is", "answer_type": "yes/no", "answers": people(*["yes"] * 9, "no")},
        {"question_id": 3, "question_type": "is", "answer_type": "yes/no", "answers": people(*["no"] * 10)},
    ]
    found = vqa_accuracy({1: "dog", 2: "yes", 3: "no"}, annotations)
    assert found.overall == 66.67 and found.by_question_type == {"is": 100.0, "what": 0.0}
    assert found.by_answer_type == {"other": 0.0, "yes/no": 100.0}
    with pytest.raises(DataError, match=r"without an answer: \[3\], without an annotation: \[4\]"):
        vqa_accuracy({1: "dog", 2: "yes", 4: "no"}, annotations)


def test_vizwiz_counts_people_who_said_exactly_this() -> None:
    said = ["Coke", "coke", "coke can", "Coke.", "unanswerable"]
    assert vizwiz_score("COKE", said) == pytest.approx(2 / 3)
    assert vizwiz_score("coke", [*said, "coke", "coke"]) == 1.0
    assert vizwiz_score("coke ", said) == 0.0
