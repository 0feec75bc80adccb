"""What is asked about a drawn face, and the exact answers: question pools, answer words, descriptions, captions."""

from __future__ import annotations

import random
import re

from face_drawing import EXPRESSIONS, GAZES, HAIR_COLOURS, HAIR_STYLES, POSES, SKIN_TYPES, Person, Scene

EXPRESSION_ANSWERS = {name: name.capitalize() for name in EXPRESSIONS}
ANSWERS: dict[str, tuple[str, ...]] = {
    "expression": tuple(EXPRESSION_ANSWERS.values()),
    "hair colour": tuple(name.capitalize() for name in HAIR_COLOURS),
    "hair style": tuple(name.capitalize() for name in HAIR_STYLES),
    "skin tone": tuple(f"Type {name}" for name in SKIN_TYPES),
    "glasses": ("Yes", "No"),
    "beard": ("Yes", "No"),
    "head pose": tuple(name.capitalize() for name in POSES),
    "gaze": tuple(name.capitalize() for name in GAZES),
    "number of people": ("One", "Two", "Three"),
    "human or not": ("Yes", "No"),
}
"""Closed question types and every answer that can occur, in a fixed order."""
DESCRIPTION = "full description"
QUESTION_TYPES = (*ANSWERS, DESCRIPTION)

QUESTIONS: dict[str, tuple[str, ...]] = {
    "expression": (
        "What is the facial expression of the person?",
        "Which emotion does this face show?",
        "How does the person feel?",
        "What expression do you see on the face?",
        "Name the emotion of this face.",
        "What feeling can be read from the face?",
    ),
    "hair colour": (
        "What is the hair colour of the person?",
        "What colour is the hair?",
        "Which hair colour does the person have?",
        "Name the colour of the hair.",
    ),
    "hair style": (
        "What is the hair style of the person?",
        "How is the hair worn?",
        "Which hair style does the person have?",
        "Name the hair style.",
    ),
    "skin tone": (
        "What is the skin tone on the Fitzpatrick scale?",
        "Which Fitzpatrick type is the skin?",
        "Name the Fitzpatrick skin type of the face.",
    ),
    "glasses": (
        "Does the person wear glasses?",
        "Is the person wearing glasses?",
        "Are there glasses on the face?",
        "Do you see glasses?",
    ),
    "beard": (
        "Does the person have a beard?",
        "Is there a beard on the face?",
        "Is the person bearded?",
        "Do you see a beard?",
    ),
    "head pose": (
        "Which way is the head turned?",
        "What is the pose of the head?",
        "In which direction does the head point?",
        "Name the head pose.",
    ),
    "gaze": (
        "Where are the eyes looking?",
        "What is the direction of the gaze?",
        "Which way does the person look?",
        "Name the gaze direction.",
    ),
    "number of people": (
        "How many people are in the picture?",
        "How many people do you see?",
        "What is the number of people?",
        "How many faces are there?",
    ),
    "human or not": (
        "Is this a human face?",
        "Is there a human in the image?",
        "Is a person visible?",
        "Does the picture show a human being?",
    ),
    DESCRIPTION: (
        "Describe this face in detail.",
        "Describe the person in detail.",
        "Please describe the image in detail.",
        "What does the face look like?",
        "Give a full description of the face.",
    ),
}
"""Paraphrases per type; the first of each is the one that ``test/questions.json`` asks."""

STRONG_EMOTION = (
    "Does the face show a strong emotion?",
    "Is the emotion strong?",
    "Is the emotion of the face intense?",
)
GENERAL = ("Tell me what you see.", "What is in the picture?", "What can be seen here?")
NOT_SHOWN = {
    "Gender": ("What is the gender of the person?", "Is this a man or a woman?"),
    "Race": ("What is the race of the person?", "Which race does the person have?"),
    "Race and Gender": ("What are the race and the gender of the person?", "Name race and gender."),
}
NOT_SHOWN_ANSWER = "A drawing does not show that."
"""Drawn faces have neither race nor gender, so these sections hold a refusal."""


def yes_no(value: bool) -> str:
    return "Yes" if value else "No"


def answers_of(scene: Scene) -> dict[str, str]:
    """Question type -> exact answer, for the types that make sense for this picture.

    Attributes are asked of single persons only, the hair colour only of a person with hair.
    """
    facts = {"human or not": yes_no(bool(scene.people))}
    if scene.people:
        facts["number of people"] = ANSWERS["number of people"][len(scene.people) - 1]
    facts[DESCRIPTION] = description(scene)
    if len(scene.people) == 1:
        person = scene.people[0]
        facts["expression"] = EXPRESSION_ANSWERS[person.expression]
        if person.hair_style != "bald":
            facts["hair colour"] = person.hair_colour.capitalize()
        facts["hair style"] = person.hair_style.capitalize()
        facts["skin tone"] = f"Type {person.skin}"
        facts["glasses"] = yes_no(person.glasses)
        facts["beard"] = yes_no(person.beard)
        facts["head pose"] = person.pose.capitalize()
        facts["gaze"] = person.gaze.capitalize()
    return facts


def _hair(person: Person) -> str:
    if person.hair_style == "bald":
        return "a bald head"
    return f"{person.hair_style} {person.hair_colour} hair"


def description(scene: Scene) -> str:
    """The long answer: every attribute in one fixed order, in two sentences."""
    if not scene.people:
        return "There is no person in the picture."
    if len(scene.people) > 1:
        return f"There are {('two', 'three')[len(scene.people) - 2]} people in the picture."
    person = scene.people[0]
    article = "An" if person.expression == "angry" else "A"
    glasses, beard = "Glasses" if person.glasses else "No glasses", "beard" if person.beard else "no beard"
    return (
        f"{article} {person.expression} person with {_hair(person)} and type {person.skin} skin. "
        f"{glasses}, {beard}, head {person.pose}, eyes {person.gaze}."
    )


def caption(scene: Scene) -> str:
    """The short text of caption data, one sentence without capitals, as web captions are after cleaning."""
    if not scene.people:
        return "a picture without a person"
    if len(scene.people) > 1:
        return f"a picture of {('two', 'three')[len(scene.people) - 2]} people"
    person = scene.people[0]
    article = "an" if person.expression == "angry" else "a"
    glasses, beard = "glasses" if person.glasses else "no glasses", "beard" if person.beard else "no beard"
    return (
        f"{article} {person.expression} person with {_hair(person)} and type {person.skin.lower()} skin, "
        f"{glasses}, {beard}, head {person.pose}, eyes {person.gaze}"
    )


def emotion_text(scene: Scene) -> str:
    """Label, comma, short description: the shape of the RealisticEmotions annotations."""
    person = scene.people[0]
    return f"{EXPRESSION_ANSWERS[person.expression]}, a person with {_hair(person)} and type {person.skin} skin"


def attribute_words(scene: Scene) -> list[str]:
    """What stands in place of a picture when the language model is trained on text alone."""
    if not scene.people:
        return ["object"]
    if len(scene.people) > 1:
        return ["person", ("two", "three")[len(scene.people) - 2]]
    person = scene.people[0]
    words = ["person", "one", person.expression, person.hair_style, f"skin{person.skin}"]
    if person.hair_style != "bald":
        words.append(person.hair_colour)
    words.append("glasses" if person.glasses else "noglasses")
    words.append("beard" if person.beard else "shaven")
    words.append(f"head{person.pose}")
    words.append(f"eyes{person.gaze}")
    return words


def blip_caption(text: str, max_words: int = 50) -> str:
    """Caption cleaning as BLIP does it: lower case, ``.!"()*#:;~`` to spaces, runs of spaces merged, words capped."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def question(kind: str, rng: random.Random) -> str:
    """One of the paraphrases of a question type."""
    return rng.choice(QUESTIONS[kind])
