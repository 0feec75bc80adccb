"""Many questions: batches, ranks, resumes and broken pictures change no answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import ChatSession, open_image
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.evaluation import engine
from minigpt4.evaluation.engine import AnswerOptions, answer_all
from minigpt4.evaluation.questions import Question
from minigpt4.models.generation import GenerateOptions
from tests.evaluation_parts import ALONE, draw_pictures, on_ranks, some_questions, tiny_assistant

SHORT = AnswerOptions(GenerateOptions(max_new_tokens=4), batch_size=3, source={"checkpoint": "a"})
SAMPLED = replace(SHORT, generation=GenerateOptions(max_new_tokens=4, do_sample=True, temperature=2.0, seed=3))


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny_assistant()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    return some_questions(draw_pictures(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="module")
def texts(assistant: Assistant, questions: list[Question]) -> list[str]:
    """Greedy answers in batches of 3."""
    return [answer.text for answer in answer_all(assistant, questions, None, SHORT, ALONE)]


@pytest.fixture(scope="module")
def drawn(assistant: Assistant, questions: list[Question]) -> list[str]:
    """Sampled answers in batches of 3."""
    return [answer.text for answer in answer_all(assistant, questions, None, SAMPLED, ALONE)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stopped(assistant: Assistant, questions: Sequence[Question], out: Path, options: AnswerOptions, at: int) -> None:
    """A run that is interrupted in its window number ``at``."""
    windows = engine._Work._window

    def window(self: Any, *arguments: Any) -> Any:
        nonlocal at
        at -= 1
        if at < 0:
            raise KeyboardInterrupt
        return windows(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Work, "_window", window)
        with pytest.raises(KeyboardInterrupt):
            answer_all(assistant, questions, out, options, ALONE)


def test_batched_answers_are_those_of_single_chats(
    assistant: Assistant, questions: list[Question], texts: list[str]
) -> None:
    for question, text in zip(questions[:6], texts[:6], strict=True):
        session = ChatSession(assistant)
        session.set_image(open_image(question.images[0]))
        assert session.ask(question.prompt, SHORT.generation) == text


def test_a_sampled_answer_depends_on_its_seed_and_id_alone(
    assistant: Assistant, questions: list[Question], texts: list[str], drawn: list[str]
) -> None:
    one_by_one = replace(SAMPLED, batch_size=1)
    assert drawn != texts
    assert [answer.text for answer in answer_all(assistant, questions[6:], None, one_by_one, ALONE)] == drawn[6:]
    other = replace(SAMPLED, generation=replace(SAMPLED.generation, seed=4))
    assert [answer.text for answer in answer_all(assistant, questions, None, other, ALONE)] != drawn


def test_row_sampling_draws_from_the_distribution() -> None:
    from minigpt4.models.row_sampling import RowSampling

    scores = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0]).log().repeat(4000, 1)
    draw = RowSampling(range(4000), 1, 1.0, 0, 1.0, torch.device("cpu"))
    chosen = draw(torch.zeros(4000, 0, dtype=torch.long), scores).argmax(-1)
    shares = chosen.bincount(minlength=5) / 4000
    assert shares[4] == 0 and torch.allclose(shares[:4], torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.03)
    narrow = RowSampling(range(4000), 1, 1.0, 1, 1.0, torch.device("cpu"))
    assert (narrow(torch.zeros(4000, 0, dtype=torch.long), scores).argmax(-1) == 0).all()


def test_ranks_give_the_file_of_one_process(
    assistant: Assistant, questions: list[Question], texts: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "a.jsonl"
    for answers in on_ranks(2, lambda dist: answer_all(assistant, questions, out, SHORT, dist)):
        assert [answer.text for answer in answers] == texts
    assert [line["answer"] for line in lines(out)] == texts
    assert [line["id"] for line in lines(out)] == [question.id for question in questions]
    assert lines(out)[1]["meta"] == {"number": 1} and lines(out)[1]["images"] == list(questions[1].images)
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.jsonl", "a.jsonl.run.json"]


def test_a_run_goes_on_behind_its_last_whole_line_on_more_ranks(
    assistant: Assistant, questions: list[Question], drawn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, small = tmp_path / "a.jsonl", replace(SAMPLED, batch_size=1)
    stopped(assistant, questions, out, small, at=2)
    part = tmp_path / "a.jsonl.rank0"
    assert len(lines(part)) == 8 and not out.exists()
    part.write_text(part.read_text()[:-5])
    assert small.ledger(out, questions).check(ALONE) == 7
    asked, seed_of = list[str](), engine.seed_of
    monkeypatch.setattr(engine, "seed_of", lambda question, seed: asked.append(question.id) or seed_of(question, seed))
    on_ranks(2, lambda dist: answer_all(assistant, questions, out, small, dist))
    assert [line["answer"] for line in lines(out)] == drawn
    assert sorted(asked) == sorted(question.id for question in questions[7:])


def test_what_is_done_is_not_asked_again_and_new_questions_are(
    assistant: Assistant, questions: list[Question], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.jsonl"
    answer_all(assistant, questions[:9], out, SHORT, ALONE)
    asked: list[str] = []
    prompt = engine.prompt_of
    monkeypatch.setattr(engine, "prompt_of", lambda a, q, n: asked.append(q.id) or prompt(a, q, n))
    answer_all(assistant, questions, out, SHORT, ALONE)
    assert asked == ["q9", "q10", "q11"]
    assert [line["answer"] for line in lines(out)] == texts


def test_a_broken_picture_is_an_error_of_its_question_and_is_tried_again(
    assistant: Assistant, questions: list[Question], texts: list[str], tmp_path: Path
) -> None:
    out, later = tmp_path / "a.jsonl", tmp_path / "later.png"
    asked = [
        *questions[:2],
        Question("x", (str(later),), "who?"),
        Question("y", (), "who? <ImageHere>"),
        *questions[2:5],
    ]
    answers = answer_all(assistant, asked, out, SHORT, ALONE)
    assert [answer.error for answer in answers[2:4]] == [
        f"image '{later}': no such file",
        "a question must not hold '<ImageHere>', which stands for a picture",
    ]
    assert [answer.text for answer in answers if not answer.error] == texts[:5]
    assert lines(out)[2]["error"] == answers[2].error and lines(out)[2]["answer"] == ""
    draw_pictures(tmp_path / "drawn", 1)[0].rename(later)
    assert answer_all(assistant, asked, out, SHORT, ALONE)[2].error == ""
    assert "error" not in lines(out)[2]


def test_a_question_without_room_for_its_answer_says_the_numbers(
    assistant: Assistant, questions: list[Question]
) -> None:
    window = assistant.model.context_window
    long = replace(SHORT, generation=GenerateOptions(max_new_tokens=window or 0))
    error = answer_all(assistant, questions[:1], None, long, ALONE)[0].error
    assert f"(max_new_tokens), but the window has {window}" in error


def test_a_rendered_prompt_and_a_question_without_pictures_are_answered(assistant: Assistant) -> None:
    rendered = Question("a", (), "<s>[INST] who? [/INST]", is_rendered=True)
    ids = engine.prompt_of(assistant, rendered, 4).ids
    assert ids[:2] == [1, 1]  # the text's own BOS behind the one that encoding puts there
    with pytest.raises(DataError, match="0 pictures for 1 <ImageHere>"):
        engine.prompt_of(assistant, replace(rendered, prompt="<ImageHere>"), 4)
    assert answer_all(assistant, [rendered, Question("b", (), "who?")], None, SHORT, ALONE)[1].text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": replace(SHORT, source={"checkpoint": "b"})}, "checkpoint was 'a', is 'b'. Give another --out"),
        ({"options": SAMPLED}, "another run: do_sample was 'False', is 'True'; temperature was '1.0', is '2.0'"),
        ({"first": Question("q0", (), "who?")}, "line 1: id 'q0' was 'who\\?' about .* is 'who\\?' about \\[\\]"),
        ({"first": Question("q99", (), "who?")}, "line 1: answers the id 'q0', which is not asked any more"),
        ({"line": "{'x'}\n"}, "line 3: is no JSON record"),
        ({"sidecar": None}, "exists, but not a.jsonl.run.json that tells where it is from"),
    ],
)
def test_answers_of_another_run_are_never_mixed(
    assistant: Assistant, questions: list[Question], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = tmp_path / "a.jsonl"
    answer_all(assistant, questions[:2], out, SHORT, ALONE)
    if "line" in change:
        out.write_text(out.read_text() + change["line"])
    if "sidecar" in change:
        (tmp_path / "a.jsonl.run.json").unlink()
    before = out.read_text()
    asked = [change.get("first", questions[0]), *questions[1:3]]
    options: AnswerOptions = change.get("options", SHORT)
    for outcome in on_ranks(2, lambda dist: answer_all(assistant, asked, out, options, dist)):
        assert isinstance(outcome, DataError)
        with pytest.raises(DataError, match=message):
            raise outcome
    assert out.read_text() == before
    again = replace(options, is_overwriting=True)
    assert len(answer_all(assistant, asked, out, again, ALONE)) == len(lines(out)) == 3


def test_a_gpu_that_is_full_gets_smaller_batches(
    assistant: Assistant, questions: list[Question], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, sizes = assistant.model.generate, list[int]()

    def limited(prompts: Sequence[Any], *rest: Any) -> list[str]:
        sizes.append(len(prompts))
        if len(prompts) > 4:
            raise torch.OutOfMemoryError
        return generate(prompts, *rest)

    monkeypatch.setattr(assistant.model, "generate", limited)
    told = answer_all(assistant, questions, None, replace(SHORT, batch_size=None), ALONE)
    assert [answer.text for answer in told] == texts and sizes == [12, 8, 4, 4, 4]
    with pytest.raises(ConfigError, match="does not hold a batch of 6; use a smaller batch_size, or auto"):
        answer_all(assistant, questions, None, replace(SHORT, batch_size=6), ALONE)


def test_a_picture_goes_through_the_vision_tower_once_for_all_its_questions(
    assistant: Assistant, questions: list[Question], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, seen = assistant.model.vision_features, list[int]()
    monkeypatch.setattr(assistant.model, "vision_features", lambda x: seen.append(len(x)) or vision(x))
    answer_all(assistant, questions, None, SHORT, ALONE)  # 12 questions about 6 pictures, in one window
    assert sum(seen) == 6


def test_sampling_with_beams_is_refused() -> None:
    with pytest.raises(ConfigError, match="either sampled .* or searched for with beams"):
        AnswerOptions(GenerateOptions(do_sample=True, num_beams=2))
