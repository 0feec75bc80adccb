"""Labels read from free answers."""

from __future__ import annotations

import pytest

from minigpt4.evaluation.faces.label_sets import (
    AGE,
    ATTRIBUTES,
    EMOTION8,
    FITZPATRICK,
    GENDER,
    HUMAN,
    INTENSITY,
    labels_of,
    presence_set,
)
from minigpt4.metrics.labels import AMBIGUOUS, LABEL, NONE, REFUSAL, LabelSet, attribute_recall, chosen_option

GLASSES = presence_set("glasses", ("glasses", "eyeglasses"))


@pytest.mark.parametrize(
    ("labels", "answer", "label"),
    [
        (EMOTION8, "Happy.", "Happy"),
        (EMOTION8, "The woman is smiling, full of joy and happiness", "Happy"),
        (EMOTION8, "He isn't happy; he looks angry", "Angry"),
        (EMOTION8, "There\u2019s no doubt: she\u2019s sad", "Sad"),
        (EMOTION8, "not only happy but joyful", "Happy"),
        (EMOTION8, "The face shows no emotion", "Neutral"),
        (EMOTION8, "unhappy", "Sad"),
        (EMOTION8, "I can't be certain, but he seems surprised", "Surprised"),
        (GLASSES, "No, but yes, I see glasses", "No"),
        (GLASSES, "The man is not wearing eyeglasses", "No"),
        (GLASSES, "a person with glasses", "Yes"),
        (GENDER, "She is a woman", "Female"),
        (HUMAN, "There is no person in the picture", "No"),
        (FITZPATRICK, "I think it is type III skin", "Type III"),
        (FITZPATRICK, "I", "Type I"),
        (FITZPATRICK, "skin type-2", "Type II"),
        (INTENSITY, "The emotion is moderate to high", "Medium"),
        (AGE, "20-29", "20-29"),
        (AGE, "about 25 years", "20-29"),
        (AGE, "in their 30s", "30-39"),
        (AGE, "between 44 and 50", "40-49"),
        (AGE, "a 7-year-old girl", "3-9"),
        (AGE, "older than 70", "more than 70"),
    ],
)
def test_one_label_is_read_from_an_answer(labels: LabelSet, answer: str, label: str) -> None:
    found = labels.extract(answer)
    assert found.status == LABEL and found.label is not None and labels.labels[found.label] == label


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("happy or sad", AMBIGUOUS),
        ("not happy", NONE),
        ("neither happy nor sad", NONE),
        ("no visible sign of any anger", NONE),
        ("banana", NONE),
        ("", NONE),
        ("I'm sorry, I can't tell the emotion", REFUSAL),
        ("It is impossible to determine whether she is happy or sad", REFUSAL),
    ],
)
def test_an_answer_without_exactly_one_label_says_why(answer: str, status: str) -> None:
    found = EMOTION8.extract(answer)
    assert (found.label, found.status) == (None, status)


def test_the_longest_word_decides() -> None:
    labels = LabelSet("size", ("old", "very old"))
    assert labels.extract("a very old man").label == 1
    with pytest.raises(ValueError, match="'a' means x and y"):
        LabelSet("twice", ("x", "y"), {"x": ("a",), "y": ("a",)})


@pytest.mark.parametrize(
    ("answer", "option"),
    [("B", 1), ("(c) Image 1, Image 2", 2), ("The answer is D", 3), ("b.", 1), ("Image 1", 0), ("Neither", 3)],
)
def test_an_option_is_chosen_by_letter_or_text(answer: str, option: int) -> None:
    assert chosen_option(answer, ["Image 1", "Image 2", "Image 1, Image 2", "Neither"]).label == option


def test_an_article_is_no_option_and_a_refusal_is_one() -> None:
    assert chosen_option("A person with glasses", ["x", "y"]).status == NONE
    assert chosen_option("I cannot identify people", ["x", "y"]).status == REFUSAL


def test_attributes_of_the_reference_are_looked_for_in_the_answer() -> None:
    reference = "A happy man with short hair, glasses and no beard."
    assert attribute_recall("A happy man wears glasses", reference, ATTRIBUTES) == pytest.approx(3 / 5)
    assert attribute_recall("anything", "A picture.", ATTRIBUTES) is None


def test_label_sets_are_found_in_references() -> None:
    assert labels_of(["happy", "Sad"] * 5, "mood") is EMOTION8
    own = labels_of(["happiness", "sadness"] * 5, "mood")
    assert own is not None and own.labels == ("happiness", "sadness") and own.extract("so sad").label == 1
    hair = labels_of(["Black", "brown", "Brown"] * 5, "hair")
    assert hair is not None and [label.lower() for label in hair.labels] == ["black", "brown"]
    assert labels_of(["a long text of six words", "another"], "text") is None
