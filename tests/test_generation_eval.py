"""Questions about image files, scored beside the baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from minigpt4 import catalog
from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import ChatSession, open_image
from minigpt4.common.errors import DataError
from minigpt4.common.schema import ProcessorConfig
from minigpt4.metrics.accuracy import exact_accuracy, is_exact, majority_accuracy, wilson_interval
from minigpt4.models.generation import GenerateOptions
from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor
from minigpt4.tasks.generation_eval import Question, answer_questions, read_questions
from tests.golden_cases import build_model, load_case

SHORT = GenerateOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    catalog.load()
    model = build_model(load_case("c_minigptv2_lora_instruction"))
    image = make_image_processor(ProcessorConfig(name="blip2_image_eval"), ImageSpec(112))
    return Assistant(model, image, make_text_processor(ProcessorConfig()), "minigpt_v2")  # type: ignore[arg-type]


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    paths = []
    for number, colour in enumerate(("red", "green", "blue")):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (40 + number, 30), colour).save(paths[-1])
    texts = ["what is the emotion of the person in the photo?", "who?", "is he happy or sad?", "who?"]
    return [Question(paths[i % 3], "t", text, "x") for i, text in enumerate(texts)]


def test_batched_answers_equal_single_chats(assistant: Assistant, questions: list[Question]) -> None:
    told: list[int] = []
    batched = answer_questions(assistant, questions, SHORT, batch_size=3, advance=told.append)
    singly = []
    for question in questions:
        session = ChatSession(assistant)
        session.set_image(open_image(question.image))
        singly.append(session.ask(question.question, SHORT))
    assert batched == singly
    assert sum(told) == len(questions)


def test_a_blank_image_is_the_same_for_every_question(assistant: Assistant, questions: list[Question]) -> None:
    same_text = [Question(q.image, q.type, "who?", q.answer) for q in questions]
    assert len(set(answer_questions(assistant, same_text, SHORT, is_blank=True))) == 1
    pixels = assistant.image_processor(open_image(questions[0].image))
    assert not torch.zeros_like(pixels).equal(pixels)


def test_questions_are_read_from_json_and_csv(tmp_path: Path) -> None:
    record = {"image": "a.png", "type": "glasses", "question": "Glasses?", "answer": "No"}
    (tmp_path / "q.json").write_text(json.dumps([record]))
    (tmp_path / "q.csv").write_text("image,question,answer\na.png,Glasses?,No\n")
    expected = Question(tmp_path / "a.png", "glasses", "Glasses?", "No")
    assert read_questions(tmp_path / "q.json", tmp_path) == [expected]
    assert read_questions(tmp_path / "q.csv", tmp_path, "glasses") == [expected]


def test_an_empty_field_is_named_with_its_record(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("image,question,answer\na.png,Glasses?,\n")
    with pytest.raises(DataError, match=r"q\.csv, record 0: field 'answer' is missing or empty"):
        read_questions(tmp_path / "q.csv", tmp_path)


def test_exact_means_equal_but_for_case_and_the_final_stop() -> None:
    assert is_exact(" happy. ", "Happy")
    assert not is_exact("Happy, a man", "Happy")
    assert exact_accuracy(["a", "b", "c"], ["a", "b", "d"]) == pytest.approx(2 / 3)
    assert majority_accuracy(["Yes", "yes", "No"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 answers for 2 references"):
        exact_accuracy(["a"], ["a", "b"])


def test_the_interval_of_a_share_is_wilson_s() -> None:
    low, high = wilson_interval(57, 60)
    assert (low, high) == (pytest.approx(0.8630, abs=2e-4), pytest.approx(0.9829, abs=2e-4))
    assert wilson_interval(60, 60)[1] == pytest.approx(1.0)
