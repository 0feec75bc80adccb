"""eval_ref.py and eval_vqa.py: prompts, scoring, files, and mistakes that are told before weights load."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.chat import loading
from minigpt4.chat.loading import Assistant
from minigpt4.cli import report_errors
from minigpt4.common.config import dump_config
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.schema import Config, RunConfig
from minigpt4.evaluation import refer, vqa
from minigpt4.evaluation.blocks import Block
from minigpt4.evaluation.command_line import eval_ref, eval_vqa
from minigpt4.evaluation.engine import AnswerOptions
from minigpt4.evaluation.questions import Answer, Question
from minigpt4.evaluation.ranking import losses_of, rank_all
from minigpt4.evaluation.refer import Retries, ask_for_boxes, evaluate_refer, refer_questions
from tests.config_fakes import REPOSITORY
from tests.evaluation_parts import ALONE, draw_pictures, on_ranks, tiny_assistant
from tests.export_parts import write_checkpoint
from tests.golden_cases import load_case

OPENING = "<s>[INST] <Img><ImageHere></Img> "
SHORT = "[vqa] Based on the image, respond to this question with a short answer: "
TRUE_BOX, RECORD = "{<0><33><24><98>}", {
    "img_id": "COCO_train2014_000000581282_10", "sents": "person bottom left",
    "bbox": [3.24, 159.31, 156.4, 312.81], "height": 480, "width": 640,
}  # fmt: skip


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return tiny_assistant()


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions of every benchmark, in the layout of the published files."""
    root = tmp_path_factory.mktemp("data")
    red, green = draw_pictures(root / "images", 2)
    names = ("COCO_train2014_000000581282.jpg", "000000000007.jpg", "COCO_val2014_000000000009.jpg", "5/image.png")
    for name in names:
        (root / "images" / name).parent.mkdir(exist_ok=True)
        (root / "images" / name).write_bytes(red.read_bytes())
    for split in ("val", "testA", "testB"):
        write(root / "refcoco" / f"refcoco_{split}.json", [RECORD, {**RECORD, "sents": "a dog"}])
    people = [{"answer": "cat", "answer_id": number} for number in range(10)]
    write(
        root / "okvqa" / "okvqa_test_split.json",
        [
            {"image_id": 7, "question": "What?", "question_id": 71},
            {"image_id": 9, "question": "Who?", "question_id": 91},
        ],
    )
    annotations = [
        {"question_id": number, "question_type": "one", "answer_type": "other", "answers": people}
        for number in (71, 91)
    ]
    write(root / "okvqa" / "mscoco_val2014_annotations_clean.json", {"info": {}, "annotations": annotations})
    answers = [{"answer": text} for text in ("Cat", "cat", "cat_dog", "dog")]
    write(root / "vizwiz" / "val.json", [{"image": "0.png", "question": "What's it?", "answers": answers}])
    choices = {"image_id": 5, "question": "How many?", "choices": ["one", "twenty two", "3"], "answer": 1}
    write(root / "icon.json", [choices, {**choices, "choices": ["red", "blue"], "answer": 0}])
    write(root / "gqa.json", [{"image": green.name, "question": "Is the sky dark?", "answer": "yes"}])
    lines = [{"img": "0.png", "text": "hello", "label": 0}, {"img": "1.png", "text": "so", "label": 1}]
    (root / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "vsr").mkdir()
    said = {"image": "1.png", "caption": "The cat is left of the dog.", "label": 1}
    (root / "vsr" / "test.jsonl").write_text(json.dumps(said) + "\n" + json.dumps({**said, "label": 0}) + "\n")
    return root


def block(data: Path, name: str) -> Block:
    files = {"iconvqa": "icon.json", "gqa": "gqa.json", "hm": "dev.jsonl", "refcoco": ""}
    return Block(name, data / "x.yaml", str(data / files.get(name, name)), str(data / "images"), 3, 2)


@pytest.fixture(scope="module")
def yaml_file(data: Path, assistant: Assistant) -> Path:
    """A YAML like the shipped one, for a checkpoint of the tiny model."""
    model = assistant.model
    weights = write_checkpoint(data / "job", model.cfg, model.trainable_state())
    blocks = {name: block(data, name) for name in (*vqa.BENCHMARKS, "refcoco")}
    keys = ("eval_file_path", "img_path", "max_new_tokens", "batch_size")
    content = {name: {key: getattr(one, key) for key in keys} for name, one in blocks.items()}
    run = RunConfig(name="tiny", save_path=str(data / "scores"))
    path = data / "benchmark.yaml"
    path.write_text(dump_config(Config(replace(model.cfg, ckpt=str(weights)), {}, run, content)))
    return path


@pytest.mark.parametrize(
    ("name", "prompt", "image"),
    [
        ("okvqa", SHORT + "Who?", "COCO_val2014_000000000009.jpg"),
        (
            "vizwiz",
            "[vqa] The question is 'What's it?' Based on the image, answer the question with a single word or phrase. "
            "and reply 'unanswerable' when the provided information is insufficient",
            "0.png",
        ),
        ("iconvqa", SHORT + "How many?", "5/image.png"),
        ("gqa", SHORT + "Is the sky dark?", "1.png"),
        ("vsr", "[vqa] Based on the image, is this statement true or false? The cat is left of the dog.", "1.png"),
        ("hm", "This is an image writting 'so'. Is this image hateful? Answer yes or no. Answer:", "1.png"),
    ],
)
def test_a_benchmark_asks_what_the_published_script_asks(data: Path, name: str, prompt: str, image: str) -> None:
    last = vqa.read_questions(block(data, name))[-1]
    assert last.prompt == f"{OPENING}{prompt} [/INST]" and last.is_rendered
    assert last.images == (str(data / "images" / image),)


def test_a_referring_expression_is_asked_for_its_place(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = refer_questions(block(data, "refcoco"), "val")
    assert asked[0].prompt == f"{OPENING}[refer] give me the location of person bottom left [/INST]"
    assert asked[0].images == (str(data / "images" / "COCO_train2014_000000581282.jpg"),)
    assert "2 expressions, the published file has 10834" in caplog.text


def scripted(
    monkeypatch: pytest.MonkeyPatch, rounds: Sequence[dict[str, str]]
) -> list[tuple[list[Question], AnswerOptions, str]]:
    """``answer_all`` gives the next of ``rounds``: answers by id. Returns what it was asked."""
    calls: list[tuple[list[Question], AnswerOptions, str]] = []

    def answer_all(_: Any, questions: list[Question], out: Path, options: AnswerOptions, dist: Any) -> list[Answer]:
        texts = rounds[len(calls)]
        calls.append((list(questions), options, out.name))
        return [
            Answer(q, texts.get(q.id, "").removeprefix("!"), "broken" if texts.get(q.id) == "!" else "")
            for q in questions
        ]

    monkeypatch.setattr(refer, "answer_all", answer_all)
    return calls


def expressions(count: int) -> list[Question]:
    meta = {"img_id": RECORD["img_id"], "bbox": RECORD["bbox"], "size": [640, 480]}
    return [Question(str(n), (), f"p{n}", {**meta, "sents": f"p{n}"}, is_rendered=True) for n in range(count)]


def test_without_resampling_an_answer_that_is_no_box_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assistant: Assistant
) -> None:
    calls = scripted(monkeypatch, [{"0": TRUE_BOX, "1": "on the left", "2": "!", "3": f"{TRUE_BOX} 7"}])
    asked = expressions(4)
    result = evaluate_refer(assistant, "refcoco_val", asked, tmp_path, AnswerOptions(), Retries(), ALONE)
    assert (result.score, result.questions, result.errors) == (25.0, 4, 1)
    assert result.details["without_box"] == 2 and len(calls) == 1
    assert json.loads((tmp_path / "refcoco_val.json").read_text()) == {RECORD["img_id"]: [TRUE_BOX, f"{TRUE_BOX}7"]}


def test_resampling_asks_five_times_and_takes_anything_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assistant: Assistant
) -> None:
    calls = scripted(
        monkeypatch, [{"0": "x", "1": "y", "2": "!"}, {"0": TRUE_BOX, "1": "y"}, *[{"1": "y"}] * 3, {"1": "z"}]
    )
    found, errors = ask_for_boxes(assistant, "r", expressions(3), tmp_path, AnswerOptions(), Retries(True), ALONE)
    assert found == [(0, TRUE_BOX), (1, "z")] and errors == 1
    assert [len(questions) for questions, _, _ in calls] == [3, 2, 1, 1, 1, 1]
    assert [out for _, _, out in calls][:2] == ["r.jsonl", "r.again1.jsonl"]
    generation = calls[2][1].generation
    assert (generation.do_sample, generation.temperature, generation.seed) == (True, 0.6, 1)
    assert calls[2][0][0].prompt == "p1"


def test_legacy_resampling_is_greedy_with_the_phrase_as_a_deeper_list_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assistant: Assistant
) -> None:
    calls = scripted(monkeypatch, [{}] * 6)
    ask_for_boxes(assistant, "r", expressions(1), tmp_path, AnswerOptions(), Retries(True, True), ALONE)
    assert [questions[0].prompt for questions, _, _ in calls[1:3]] == [
        f"{OPENING}[refer] give me the location of ['p0'] [/INST]",
        f"{OPENING}[refer] give me the location of [['p0']] [/INST]",
    ]
    assert not any(options.generation.do_sample for _, options, _ in calls)


@pytest.mark.parametrize(
    ("name", "texts", "score", "predictions"),
    [
        (
            "okvqa",
            ["Cat <unk>", "dog"],
            50.0,
            [{"answer": "cat", "question_id": 71}, {"answer": "dog", "question_id": 91}],
        ),
        ("vizwiz", ["CAT"], 200 / 3, [{"answer": "CAT"}]),
        ("gqa", ["Yes"], 100.0, [{"pred": "yes", "gt": "yes"}]),
        ("vsr", ["True", "True"], 50.0, [{"pred": "True", "gt": "true"}, {"pred": "True", "gt": "false"}]),
        ("hm", ["No", "maybe"], 50.0, [{"pred": 0, "gt": 0}, {"pred": "maybe", "gt": 1}]),
    ],
)
def test_answers_are_scored_and_saved_as_published(
    data: Path, name: str, texts: list[str], score: float, predictions: list[Any]
) -> None:
    asked, judge = vqa.read_questions(block(data, name)), vqa.BENCHMARKS[name].score
    assert judge is not None
    scored = judge(block(data, name), [Answer(q, text) for q, text in zip(asked, texts, strict=True)])
    assert scored.score == pytest.approx(score) and scored.predictions == predictions


def test_candidates_have_the_reference_s_losses(assistant: Assistant) -> None:
    case = load_case("c_minigptv2_lora_instruction")
    turns = [turns[0] for turns in case.turns()]
    prompts = [assistant.model.encoder.encode_prompt([], turn.prompt) for turn in turns]
    features = assistant.model.vision_features(case.tensor("image"))
    losses = losses_of(assistant.model, prompts, features, [[turn.answer] for turn in turns])
    torch.testing.assert_close(losses[:, 0], case.tensor("loss_none"), atol=1e-5, rtol=1e-5)


def test_a_missing_candidate_is_never_chosen_and_a_broken_picture_is_wrong(data: Path, assistant: Assistant) -> None:
    asked = vqa.read_questions(block(data, "iconvqa"))
    broken = replace(asked[0], id="x", images=("nowhere.png",))
    options = AnswerOptions(batch_size=3)
    ranked = rank_all(assistant, [broken, *asked], None, options, ALONE)
    assert [len(one.losses) for one in ranked] == [0, 3, 2]
    assert ranked[0].choice == -1 and ranked[0].error == "image 'nowhere.png': no such file"
    assert all(one.choice == min(range(len(one.losses)), key=one.losses.__getitem__) for one in ranked[1:])
    assert [one.losses for one in rank_all(assistant, [broken], None, options, ALONE)] == [()]


@pytest.fixture(scope="module")
def riddles(data: Path) -> list[Question]:
    """13 questions of different lengths, so that what stands in a batch shows in its scores."""
    first, second = vqa.read_questions(block(data, "iconvqa"))
    ends = [" why" * (number % 5) for number in range(13)]
    return [
        replace((first, second)[number % 2], id=str(number), prompt=first.prompt + end)
        for number, end in enumerate(ends)
    ]


def test_a_ranking_that_was_cut_off_goes_on_with_the_same_batches_on_more_ranks(
    assistant: Assistant, riddles: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = AnswerOptions(batch_size=2, source={"weights": "a"}), tmp_path / "icon.jsonl"
    expected = rank_all(assistant, riddles, tmp_path / "whole.jsonl", options, ALONE)
    whole = (tmp_path / "whole.jsonl").read_text()
    assert expected != rank_all(assistant, riddles, None, replace(options, batch_size=3), ALONE)
    batches: list[int] = []

    def counted(model: Any, prompts: Any, *others: Any) -> Any:
        if len(batches) == 5:  # in the second window of four batches
            raise KeyboardInterrupt
        batches.append(len(prompts))
        return losses_of(model, prompts, *others)

    monkeypatch.setattr("minigpt4.evaluation.ranking.losses_of", counted)
    with pytest.raises(KeyboardInterrupt):
        rank_all(assistant, riddles, out, options, ALONE)
    (part,) = tmp_path.glob("icon.jsonl.rank0")
    kept = part.read_text().splitlines(keepends=True)
    assert len(kept) == 8
    part.write_text("".join(kept[:7]) + kept[7][:20])  # a batch of which half is on disk is asked again
    batches.clear()
    ranked = on_ranks(2, lambda dist: rank_all(assistant, riddles, out, options, dist))
    assert sorted(batches) == [1, 2, 2, 2] and ranked == [expected, expected]
    assert out.read_text() == whole
    batches.clear()
    assert rank_all(assistant, riddles, out, options, ALONE) == expected and batches == []


def test_a_ranking_of_other_candidates_or_batches_is_never_mixed_in(
    assistant: Assistant, riddles: list[Question], tmp_path: Path
) -> None:
    options, out = AnswerOptions(batch_size=2), tmp_path / "icon.jsonl"
    rank_all(assistant, riddles[:2], out, options, ALONE)
    with pytest.raises(DataError, match="batch_size was '2', is '3'"):
        rank_all(assistant, riddles[:2], out, replace(options, batch_size=3), ALONE)
    other = replace(riddles[0], meta={**riddles[0].meta, "choices": ["a", "b", "c"]})
    with pytest.raises(DataError, match="candidates was"):
        rank_all(assistant, [other, riddles[1]], out, options, ALONE)


def test_eval_vqa_scores_every_benchmark_in_one_go(
    yaml_file: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ",".join(vqa.BENCHMARKS)
    assert eval_vqa(["--cfg-path", str(yaml_file), "--dataset", names]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in vqa.BENCHMARKS)
    results = json.loads((data / "scores" / "results.json").read_text())
    assert list(results) == list(vqa.BENCHMARKS)
    assert results["hm"]["questions"] == 2 and results["hm"]["about"]["name"] == "tiny"
    written = {path.name for path in (data / "scores").iterdir()}
    assert {"okvqa.json", "okvqa.jsonl", "iconvqa.json", "iconvqa.jsonl", "vsr.json"} <= written
    monkeypatch.setattr("minigpt4.evaluation.engine._Work._window", None)  # nothing is asked a second time
    assert eval_vqa(["--cfg-path", str(yaml_file), "--dataset", "gqa,hm,iconvqa"]) == 0
    assert (
        report_errors(lambda: eval_vqa(["--cfg-path", str(yaml_file), "--dataset", "hm", "--max_new_tokens", "4"])) == 2
    )
    assert "max_new_tokens was '3', is '4'" in capsys.readouterr().err


def test_eval_ref_prints_a_line_per_split(yaml_file: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = str(data / "job")
    assert eval_ref(["--cfg-path", str(yaml_file), "--ckpt", ckpt, "--resample", "--name", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("refcoco ")] == [
        f"refcoco {split}: 0.00" for split in ("val", "testA", "testB")
    ]
    result = json.loads((data / "scores" / "results.json").read_text())["refcoco_testB"]
    assert result["about"]["name"] == "mine" and result["details"]["without_box"] == 0


Program = Callable[[list[str]], int]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (eval_vqa, ["--dataset", "okvq"], "--dataset: unknown 'okvq' (did you mean 'okvqa'?); known: okvqa, vizwiz"),
        (eval_vqa, ["--dataset", "refcoco"], "known: okvqa, vizwiz, iconvqa, gqa, vsr, hm; eval_ref.py scores it"),
        (eval_vqa, ["--dataset", ","], "--dataset names nothing"),
        (eval_ref, ["--dataset", "refcocog"], "evaluation_datasets.refcocog: missing (did you mean 'refcoco'?)"),
        (eval_vqa, ["--dataset", "hm", "--batch_size", "0"], "hm.batch_size: found 0, expected a whole number >= 1"),
        (
            eval_vqa,
            ["--options", "evaluation_datasets.gqa.eval_file_path=no.json"],
            "gqa.eval_file_path: 'no.json' not",
        ),
        (eval_vqa, ["--options", "evaluation_datasets.gqa.img_path=no"], "evaluation_datasets.gqa.img_path: 'no' not"),
        (eval_vqa, ["--options", "evaluation_datasets.gqa.img_path=/path/to/x"], "found the placeholder '/path/to/x'"),
        (eval_vqa, ["--options", "evaluation_datasets.gqa.img_pth=x"], "unknown key (did you mean 'img_path'?)"),
        (eval_vqa, ["--options", "evaluation_datasets.gqa.img_path={job}"], "gqa.img_path: '{job}/1.png' not found"),
        (eval_vqa, ["--options", "evaluation_datasets.gqa.eval_file_path={job}"], "holds none of: testdev_balanced"),
        (eval_vqa, ["--ckpt", "nowhere"], "checkpoint 'nowhere': no such directory"),
    ],
)
def test_a_mistake_is_told_with_its_key_before_weights_load(
    yaml_file: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    program: Program,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(loading, "_build", None)
    given = [argument.replace("{job}", str(data / "job")) for argument in arguments]
    dataset = [] if "--dataset" in given else ["--dataset", "gqa"]
    assert report_errors(lambda: program(["--cfg-path", str(yaml_file), *dataset, *given])) == 2
    assert message.replace("{job}", str(data / "job")) in capsys.readouterr().err


def test_vsr_from_the_hub_says_what_it_needs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub = replace(block(data, "vsr"), eval_file_path="cambridgeltl/vsr_zeroshot")
    with pytest.raises(
        ConfigError, match="vsr.eval_file_path: 'cambridgeltl/vsr_zeroshot' is no file here; give a local"
    ):
        vqa.read_questions(hub)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("gqa", {"image": "0.png"}, "record 0: field 'question' is missing; found: image"),
        ("vizwiz", {"image": "0.png", "question": "x", "answers": ["y"]}, "record 0: does not fit \\(TypeError: "),
        ("hm", {"img": "0.png", "text": "x", "label": "?"}, "record 0: does not fit \\(ValueError: invalid literal"),
        ("iconvqa", {"image_id": 1, "question": "x", "choices": ["y"], "answer": 1}, "answer 1 is no index of choices"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(
    tmp_path: Path, data: Path, name: str, record: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "file.json", [record])
    with pytest.raises(DataError, match=message):
        vqa.read_questions(replace(block(data, name), eval_file_path=str(path)))


def test_a_box_that_is_none_is_named(tmp_path: Path, data: Path) -> None:
    write(tmp_path / "refcoco_val.json", [{**RECORD, "bbox": [1, 2, 3]}])
    with pytest.raises(DataError, match="refcoco_val.json, record 0: does not fit .*not enough values"):
        refer_questions(replace(block(data, "refcoco"), eval_file_path=str(tmp_path)), "val")


@pytest.mark.parametrize("name", ["eval_ref", "eval_vqa"])
def test_the_scripts_explain_themselves(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "eval_scripts" / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0 and "--cfg-path FILE --dataset A,B" in " ".join(
        capsys.readouterr().out.replace("[", "").replace("]", "").split()
    )
