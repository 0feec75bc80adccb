"""Face evaluation from files to scores: generated and compared answers, baselines, groups, comparisons."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minigpt4.chat import loading
from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import open_image
from minigpt4.cli import report_errors
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.evaluation.engine import AnswerOptions, answer_all, prompt_of
from minigpt4.evaluation.faces import consistency
from minigpt4.evaluation.faces.cases import Case, FaceSet
from minigpt4.evaluation.faces.command_line import caption_folder, eval_faces, validate_emotions
from minigpt4.evaluation.faces.compare import differences, read_predictions
from minigpt4.evaluation.faces.label_sets import EMOTION8, FITZPATRICK
from minigpt4.evaluation.faces.likelihood import answer_likelihoods
from minigpt4.evaluation.faces.run import FaceEvaluation, Wishes
from minigpt4.evaluation.faces.scores import read_rows, section_scores, slice_scores
from minigpt4.evaluation.questions import Answer, Question
from minigpt4.models.generation import GenerateOptions
from minigpt4.report.answers import read_answers
from tests.evaluation_parts import ALONE, draw_pictures, on_ranks, tiny_assistant
from tests.export_parts import write_checkpoint

SHORT = AnswerOptions(GenerateOptions(max_new_tokens=3), source={"weights": "a"})
WORDS = ("sad", "happy as can be", "angry")


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny_assistant()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw_pictures(tmp_path_factory.mktemp("pictures"), 4)


@pytest.fixture(scope="module")
def checkpoint(assistant: Assistant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = assistant.model
    return write_checkpoint(tmp_path_factory.mktemp("job"), model.cfg, model.trainable_state())


def faces(pictures: list[Path], count: int = 4) -> FaceSet:
    cases = tuple(
        Case(str(i), (str(pictures[i % len(pictures)]),), "Mood?", EMOTION8.labels[i % 2], "emotion", EMOTION8)
        for i in range(count)
    )
    return FaceSet("drawn", cases)


def test_a_likelihood_is_that_of_the_answer_alone_in_a_batch(assistant: Assistant, pictures: list[Path]) -> None:
    meta = {"answers": list(WORDS)}
    questions = [
        Question("a", (str(pictures[0]),), "Mood?", meta),
        Question("b", (str(pictures[1]), str(pictures[0])), "Are these two alike, and what is their mood?", meta),
        Question("c", (), "Mood?", meta),
    ]
    options = replace(SHORT, respond=answer_likelihoods, batch_size=4)
    answers = answer_all(assistant, questions, None, options, ALONE)
    found = [json.loads(answer.text) for answer in answers]
    model = assistant.model
    for question, scores in zip(questions, found, strict=True):
        pixels = [assistant.image_processor(open_image(path)) for path in question.images]
        images = torch.stack(pixels) if pixels else torch.zeros(0, 3, 1, 1)
        prompt = prompt_of(assistant, question, 1).ids
        for word, score in zip(WORDS, scores, strict=True):
            target = model.encoder.tokenizer.encode(word + model.encoder.end_sym)
            ids = torch.tensor([prompt + target])
            with torch.no_grad():
                embedded = model.embed(ids, images, len(pixels) * model.encoder.num_image_tokens)
                logits = model._lm(inputs_embeds=embedded).logits[0, len(prompt) - 1 : -1].float()
            picked = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])
            assert score == pytest.approx(float(picked.mean()), abs=1e-4)


def test_likelihoods_are_averaged_over_seeded_orders_and_ranks_agree(
    assistant: Assistant, pictures: list[Path], tmp_path: Path
) -> None:
    wishes = Wishes(modes=("likelihood",), permutations=2, seed=5, with_blank=False)
    one = FaceEvaluation(faces(pictures, 3), wishes, tmp_path / "one", SHORT)
    one.run(assistant, ALONE)
    lines = [json.loads(line) for line in (tmp_path / "one/predictions.likelihood.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (tmp_path / "one/answers.likelihood.jsonl").read_text().splitlines()]
    assert len(asked) == 6 and asked[0]["question"] != asked[1]["question"]
    means = np.mean([json.loads(asked[0]["answer"]), json.loads(asked[1]["answer"])], axis=0)
    assert list(lines[0]["likelihoods"].values()) == pytest.approx(means.tolist(), abs=1e-4)
    assert lines[0]["answer"] == EMOTION8.labels[int(means.argmax())] == lines[0]["extracted"]["label"]
    two = FaceEvaluation(faces(pictures, 3), wishes, tmp_path / "two", SHORT)
    on_ranks(2, lambda dist: two.run(assistant, dist))
    again = [json.loads(line) for line in (tmp_path / "two/predictions.likelihood.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in again] == [line["answer"] for line in lines]


def test_scores_count_invalid_answers_as_wrong_and_name_baselines() -> None:
    types = ["Type I", "Type II", "Type II", "Type IV"]
    cases = [Case(str(i), (f"{i}.png",), "?", label, "skin", FITZPATRICK) for i, label in enumerate(types)]
    rows = read_rows(cases, ["Type I", "type 3", "I'm sorry, I can't tell", ""], ["", "", "", "broken.png"])
    blank = read_rows(cases, ["Type II"] * 4, [""] * 4)
    scores = section_scores(rows, blank)
    assert (scores["n"], scores["errors"]) == (3, 1)
    assert scores["accuracy"]["value"] == pytest.approx(1 / 3, abs=1e-5)
    assert scores["invalid"] == pytest.approx(1 / 3) and scores["refusal"] == pytest.approx(1 / 3)
    assert scores["mean_absolute_error"]["value"] == pytest.approx((0 + 1 + 4) / 3, abs=1e-5)
    assert scores["within_one"] == pytest.approx(2 / 3)
    assert scores["baselines"] == pytest.approx({"majority": 2 / 3, "chance": 1 / 6, "blank": 2 / 3})
    assert scores["confusion"]["counts"][1] == [0, 0, 1, 0, 0, 0, 1]
    assert scores["per_class"]["Type II"] == {"n": 2, "precision": None, "recall": 0.0, "f1": 0.0}


def test_texts_are_scored_by_overlap_and_attributes() -> None:
    cases = [Case("1", ("a.png",), "?", "A happy man with a beard.", "text")]
    rows = read_rows(cases, ["A happy man."], [""])
    scores = section_scores(rows, [])
    assert scores["rouge_l"]["value"] == pytest.approx(2 * 1 * 0.5 / 1.5, abs=1e-5)
    assert scores["attribute_recall"]["value"] == pytest.approx(2 / 3, abs=1e-5)


def test_small_groups_are_listed_and_not_compared() -> None:
    meta = ["II"] * 6 + ["V"] * 5 + ["VI"] * 2
    cases = [
        Case(str(i), (f"{i}",), "?", "Happy", "emotion", EMOTION8, meta={"skin": skin}) for i, skin in enumerate(meta)
    ]
    rows = read_rows(cases, ["happy"] * 6 + ["sad"] * 7, [""] * 13)
    found = slice_scores(rows, ["skin", "nothing"], min_size=5)["skin"]
    assert found["too_small"] == {"VI": 2} and found["gap"]["value"] == 1.0 and found["chance"] < 0.05
    assert found["groups"]["V"]["n"] == 5 and found["groups"]["V"]["high"] > 0.3


def test_two_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    cases = [Case(str(i), (f"{i}",), "?", EMOTION8.labels[i % 2], "emotion", EMOTION8) for i in range(40)]
    old = [row.record() for row in read_rows(cases, ["Happy"] * 40, [""] * 40)]
    new = [row.record() for row in read_rows(cases, [case.reference for case in cases], [""] * 40)]
    found = differences({line["id"]: line for line in new}, {line["id"]: line for line in old})
    assert [item.score for item in found] == ["accuracy", "balanced_accuracy", "macro_f1"]
    assert found[0].found.value == 0.5 and found[0].found.low > 0.3 and found[0].n == 40
    with pytest.raises(DataError, match="share no question"):
        differences({}, {})
    with pytest.raises(DataError, match="no predictions.generate.jsonl"):
        read_predictions(tmp_path, "generate")


def test_the_program_scores_own_data_and_goes_on(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = ["image,label,section,skin"]
    rows += [f"{i % 4}.png,{'Happy' if i % 2 else 'Sad'},emotion,{'II' if i % 3 else 'V'}" for i in range(6)]
    rows += ["0.png,A red picture of nothing at all.,description,II", "gone.png,Happy,emotion,II"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    command = [
        "--ckpt", str(checkpoint), "--dataset", "own", "--annotations", str(tmp_path / "a.csv"), "--data-root",
        str(pictures[0].parent), "--question", "Mood?", "--by", "skin", "--min-group", "2", "--max-new-tokens", "3",
        "--mode", "both", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert eval_faces(command) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    generated = results["modes"]["generate"]
    assert list(generated["sections"]) == ["emotion", "description"]
    assert generated["sections"]["emotion"]["n"] == 6 and generated["sections"]["emotion"]["errors"] == 1
    assert {"majority", "chance", "blank"} <= set(generated["sections"]["emotion"]["baselines"])
    assert list(results["modes"]["likelihood"]["sections"]) == ["emotion"]
    assert set(generated["groups"]["emotion"]["skin"]["groups"]) == {"II", "V"}
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.generate.jsonl").read_text().splitlines()]
    assert {"id", "question", "answer", "reference", "section", "correct"} <= set(lines[0]) and "error" in lines[-1]
    reported = read_answers(tmp_path / "out/predictions.generate.jsonl")
    assert set(reported.sections()) == {"emotion", "description"} and set(reported.slices()) == {"skin"}
    blank = (tmp_path / "out/answers.blank.generate.jsonl").read_text().splitlines()
    assert len(blank) == 1  # all questions read alike
    before = (tmp_path / "out/results.json").read_text()
    assert eval_faces([*command, "--compare", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/results.json").read_text() == before
    monkeypatch.setattr(loading, "_build", None)  # what follows is told before weights load
    assert report_errors(lambda: eval_faces([*command, "--by", "skni"])) == 2
    assert report_errors(lambda: eval_faces([*command, "--dataset", "rafbd"])) == 2
    assert report_errors(lambda: eval_faces([*command, "--max-new-tokens", "4"])) == 2
    told = capsys.readouterr().err
    for message in ("did you mean 'skin'", "did you mean 'rafdb'", "belongs to another run"):
        assert message in told


def test_likelihoods_of_free_text_are_refused(pictures: list[Path], tmp_path: Path) -> None:
    text = FaceSet("texts", (Case("1", (str(pictures[0]),), "?", "Some long text.", "text"),))
    with pytest.raises(ConfigError, match="asks for free text, which has no answers to compare"):
        FaceEvaluation(text, Wishes(modes=("likelihood",)), tmp_path, SHORT)


def test_fifty_answers_become_one_line_per_picture(tmp_path: Path) -> None:
    questions = consistency.fifty_questions(tmp_path, ["a.png", "b.png"])
    assert len({question.prompt for question in questions}) == 50 and len(questions) == 100
    texts = ["Joy"] * 30 + ["She looks sad"] * 15 + ["banana"] * 5 + ["nothing"] * 50
    answers = [Answer(question, text) for question, text in zip(questions, texts, strict=True)]
    truth = {"a.png": "sad", "b.png": "happy"}
    scores = consistency.score_pictures(answers, truth, consistency.by_words)
    assert scores[0].row()[:6] == ("a.png", "sad", "happy", 60.0, 30.0, True)
    assert scores[1].row()[2:6] == ("no label", 100.0, 0.0, False)
    consistency.write_scores(tmp_path / "x.csv", scores)
    with (tmp_path / "x.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == consistency.COLUMNS
    assert "accuracy of the most frequent answer: 0.0 %" in consistency.summary(scores)


def test_the_published_score_takes_the_nearest_of_its_categories() -> None:
    def embed(texts: Any) -> Any:  # letters as directions
        return np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float32)

    assert consistency.by_embedding(embed)(["joy", "so sad sad"]) == ["joy", "sad"]


def test_the_programs_of_the_first_version_answer_folders(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = str(pictures[0].parent), tmp_path / "captions.json"
    command = ["--ckpt", str(checkpoint), "--image-dir", folder, "--limit", "3", "--output", str(out)]
    assert caption_folder([*command, "--max-new-tokens", "3"]) == 0
    found = json.loads(out.read_text())
    assert [Path(item["path"]).name for item in found] == ["0.png", "1.png", "2.png"] and set(found[0]) == {
        "path",
        "text",
    }
    (tmp_path / "truth.json").write_text(json.dumps({"0.png": "joy", "1.png": "Sad", "gone.png": "sad"}))
    monkeypatch.setattr(consistency, "prompt_lines", lambda name: ("Mood?", "Feeling?"))
    table = tmp_path / "scores.csv"
    command = ["--ckpt", str(checkpoint), "--image-dir", folder, "--output", str(table)]
    assert validate_emotions([*command, "--ground-truth", str(tmp_path / "truth.json"), "--batch-size", "4"]) == 0
    with table.open(newline="") as file:
        assert [row["ground_truth"] for row in csv.DictReader(file)] == ["happy", "sad"]
    (tmp_path / "truth.json").write_text(json.dumps({"0.png": "hapy"}))
    with pytest.raises(DataError, match="'0.png': 'hapy' is no emotion .did you mean 'Happy'"):
        validate_emotions([*command, "--ground-truth", str(tmp_path / "truth.json")])
