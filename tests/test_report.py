"""The page about a run: everything is there, nothing is fetched, nothing of the data becomes markup."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minigpt4 import cli
from minigpt4.common.errors import CheckpointError, ConfigError, DataError
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, ModelConfig, RunConfig
from minigpt4.report.job import find_job, read_job
from minigpt4.report.setup import changes
from minigpt4.report.write import FILE, Wishes, write_after_training, write_report
from minigpt4.tools.report import build_parser
from tests.report_parts import COMMAND, CONFIG, WINDOWS, Page, answers, picture, write_job

HOSTILE = "<script>alert('x')</script>\"'&<img src=http://evil.example onerror=alert(1)>"
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "nav", "a", "h1", "h2", "h3", "p", "b", "i", "span", "div",
    "table",
    "caption", "thead", "tbody", "tr", "th", "td", "code", "pre", "details", "summary", "ul", "li", "img", "figure",
    "figcaption", "svg", "g", "path", "line", "rect", "circle", "text",
}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with 24 answers, 18 of them right."""
    root = tmp_path_factory.mktemp("run")
    for number in range(24):
        picture(root / "images" / f"{number}.png")
    return write_job(root / "output" / "faces" / "20260101_120000", answers(root / "images", 18))


@pytest.fixture(scope="module")
def page(job: Path) -> Page:
    return Page(write_report([job]).read_text(encoding="utf-8"))


def _check_closed(page: Page) -> None:
    """Nothing runs and nothing is fetched."""
    assert {tag for tag, _ in page.tags} <= ALLOWED
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "@import" not in page.html and "url(" not in page.html


def test_a_page_holds_every_part_of_a_run(page: Page) -> None:
    for name in ("Curves", "Held-out answers", "Examples", "Canaries", "Data", "Configuration", "Origin"):
        assert name in page.text
    assert "finished" in page.text and f"{WINDOWS} windows, 12 s" in page.text
    assert COMMAND in page.text and "torch 2.6.0" in page.text and "vit.safetensors" in page.text
    assert "0123456789ab" in page.text and "1,234" in page.text and "What is it? 12" in page.text
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory", "Step phases"):
        assert f"<b>{title}</b>" in page.html
    assert "backward 50.0 % (500 ms)" in page.text
    assert "12: window 0.167, smoothed" in page.text  # the values under the pointer


def test_a_page_needs_no_script_and_no_other_file(page: Page) -> None:
    _check_closed(page)
    assert page.count("script") == 0 and "default-src 'none'" in page.html
    assert page.count("img") == 6 + 8  # six wrong answers and eight of the right ones


def test_scores_have_intervals_sections_and_properties(page: Page) -> None:
    assert re.search(r"faces window 12 24 75.0 % \(5\d\.\d to 9\d\.\d\) 33.3 %", page.text)
    assert "faces: by section" in page.text and "part 1" in page.text
    assert "age (largest gap of exact:" in page.text
    assert "emotion (largest" not in page.text  # it is the reference itself
    assert "file (largest" not in page.text  # a value per record is no group
    assert "faces: confusions" in page.text and "other" in page.text


def test_hostile_text_stays_text_wherever_it_comes_from(tmp_path: Path) -> None:
    rows = [
        {
            **row, "id": HOSTILE, "question": HOSTILE, "answer": HOSTILE, "reference": HOSTILE * (number % 2) or "b",
            "section": f"{HOSTILE}{number % 3}", "meta": {'<b onclick="x">': f"<i>{number % 2}"},
        }
        for number, row in enumerate(answers(tmp_path, 3, 8))
    ]  # fmt: skip
    extra = {
        "command": HOSTILE, "git": HOSTILE, "started": HOSTILE, "arch": HOSTILE, "device": HOSTILE,
        "world_size": HOSTILE,
        "versions": {HOSTILE: HOSTILE}, "bad_records": {HOSTILE: {"count": HOSTILE, "examples": [HOSTILE]}},
        "load_report": [{"source": HOSTILE, "parts": {HOSTILE: {"loaded": HOSTILE}}, "remarks": [HOSTILE]}],
        "weights_from": HOSTILE, "earlier_starts": [{"command": HOSTILE, "resumed_from": HOSTILE}],
    }  # fmt: skip
    config = {**CONFIG, "run": {HOSTILE: HOSTILE, "init_lr": HOSTILE}, "datasets": {HOSTILE: {"builder": HOSTILE}}}
    jobs = [
        write_job(tmp_path / name / HOSTILE.replace("/", ""), rows, config, HOSTILE, HOSTILE, extra)
        for name in ("a", "b<i>")
    ]
    for runs in (jobs[:1], jobs):
        page = Page(write_report(runs, Wishes(tmp_path / "page.html")).read_text(encoding="utf-8"))
        _check_closed(page)
        assert page.text.count("alert('x')") > 20


def test_two_runs_show_paired_differences_and_what_differs(job: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "run": {**CONFIG["run"], "init_lr": 5e-4}}
    images = job.parents[2] / "images"
    other = write_job(tmp_path / "faces" / "20260102_120000", answers(images, 12), config, offset=0.5)
    out = write_report([job, other])
    assert out.name == "report_against_faces_20260102_120000.html" and out.parent == job
    page = Page(out.read_text(encoding="utf-8"))
    _check_closed(page)
    assert re.search(r"faces exact 24 75.0 50.0 -25.0 \(-4\d\.\d to -\d\.\d\)", page.text)
    assert "<b>-25.0" in page.html  # more than chance
    assert "run.init_lr 0.0001 0.0005" in page.text and "run.seed 42 42" not in page.text
    assert "only A is right 6" in page.text and "only B is right" not in page.text
    assert "A smoothed" in page.text and "B smoothed" in page.text


def test_runs_that_were_asked_different_questions_are_not_paired(job: Path, tmp_path: Path) -> None:
    rows = [{**row, "id": f"other {row['id']}"} for row in answers(tmp_path, 5)]
    other = write_job(tmp_path / "b" / "20260102_120000", rows)
    text = Page(write_report([job, other], Wishes(tmp_path / "x.html")).read_text(encoding="utf-8")).text
    assert "the two runs share no question" in text and "Both runs answered" not in text


def test_a_run_is_found_from_a_checkpoint_and_from_a_folder_of_jobs(job: Path, tmp_path: Path) -> None:
    for place in (job, job.parent, job / "checkpoints", job / "checkpoints" / "best"):
        assert find_job(place) == job.resolve()
    with pytest.raises(CheckpointError, match="no such folder"):
        find_job(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"holds no log.txt, no manifest.json and no job"):
        find_job(tmp_path)


def test_a_run_of_before_that_kept_little_still_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "old" / "20250101_000000"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"command": "python train.py", "data": None, "versions": 3}))
    page = Page(write_report([folder]).read_text(encoding="utf-8"))
    assert "python train.py" in page.text and "there are no curves" in page.text and "not finished" in page.text


def test_time_counts_every_start_and_nulls_leave_gaps(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "20260101_000000"
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"window": 1, "loss": 2.0, "elapsed_s": 10.0, "grad_norm": None},
        {"window": 2, "loss": 1.0, "elapsed_s": 20.0, "eta_s": 9.0},
        {"event": "resumed", "window": 2, "config": {}},
        {"window": 3, "loss": 0.5, "elapsed_s": 5.0, "eta_s": 0.0},
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '"text"\n{"window": 4, "lo')
    found = read_job(folder)
    assert (found.seconds, found.resumes, found.status, found.window) == (25.0, [2], "finished", 3)
    html = write_report([folder]).read_text(encoding="utf-8")
    assert 'class="mark"' in html and "Gradient norm" not in html


def test_settings_that_are_not_the_default_come_first() -> None:
    found = {key: (value, default) for key, value, default in changes(CONFIG)}
    assert found["run.init_lr"] == (1e-4, 3e-5) and found["model.image_size"] == (448, 224)
    assert found["datasets.faces.build_info.ann_path"] == ("faces.csv", "")
    assert "run.seed" not in found


def test_predictions_of_any_program_join_the_page(job: Path, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "question": "q", "answer": "Two.", "reference": ["2", "two"], "image": "0.png", "gender": "f"},
        {"id": 2, "question": "q", "answer": "three", "reference": 3, "gender": "m", "error": "", "score": 0.5},
    ]
    path = tmp_path / "counting.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    picture(tmp_path / "0.png")
    text = Page(write_report([job], Wishes(tmp_path / "x.html", [[path]])).read_text(encoding="utf-8")).text
    assert "counting 2 50.0 %" in text and "reference: 2 | two" in text and "counting: wrong 1" in text
    with pytest.raises(ConfigError, match=r"--predictions: found 1 file\(s\), expected one of each run"):
        write_report([job, job], Wishes(tmp_path / "x.html", [[path]]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": 1, "question": "q", "answer": "a"}',
            r"line 2: field 'reference' is missing; found: id, question, answer",
        ),
        ('{"id": 1, "question": "q", "answer": "a", "references": "b"}', r"did you mean 'references'"),
        ("[1]", "line 2: found list, expected an object with id, question, answer, reference"),
        ('{"id"', "line 2: is no JSON"),
    ],
)
def test_predictions_that_cannot_be_read_are_named(job: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"id": 0, "question": "q", "answer": "a", "reference": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        write_report([job], Wishes(predictions=[[path]]))
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no answers"):
        write_report([job], Wishes(predictions=[[path]]))


def test_after_training_trouble_is_a_warning_that_names_the_cause(
    job: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        write_after_training(job)
        assert f"report {job.resolve() / FILE}" in caplog.text
        write_after_training(tmp_path / "gone")
        broken = write_job(tmp_path / "a" / "20260101_120000")
        (broken / "manifest.json").write_text("{")
        write_after_training(broken)
    warned = [item.getMessage() for item in caplog.records if item.levelno == logging.WARNING]
    assert len(warned) == 2 and "no such folder" in warned[0] and "manifest.json: is no JSON" in warned[1]


def test_every_training_ends_with_a_report(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job / FILE).unlink(missing_ok=True)
    run = RunConfig(device="cpu", job_name="x", distributed=False)
    configs = [Config(ModelConfig(), {}, replace(run, report=wanted)) for wanted in (True, True, False)]
    windows = iter([2, 0, 2])  # run.evaluate, and a run that was finished before, train none
    known = registry.get

    class Runner:
        def __init__(self, *_: object) -> None:
            self.progress, self.job_dir = SimpleNamespace(window=3), job

        def train(self) -> int:
            self.progress.window += next(windows)
            return 0

    def get(kind: str, name: str) -> Any:
        return Runner if kind == "runner" else known(kind, name)

    monkeypatch.setattr("minigpt4.catalog.load", lambda: None)
    monkeypatch.setattr("minigpt4.common.logger.setup_logging", lambda is_main: None)
    monkeypatch.setattr("minigpt4.common.config.load_config", lambda *_: configs.pop(0))
    monkeypatch.setattr(registry, "get", get)
    monkeypatch.setattr("minigpt4.report.setup.defaults", lambda config: {})
    assert cli.train("x.yaml") == 0 and (job / FILE).is_file()
    (job / FILE).unlink()
    assert cli.train("x.yaml") == 0 and not (job / FILE).exists()
    assert cli.train("x.yaml") == 0 and not (job / FILE).exists()  # run.report: false


def test_the_command_line_says_what_to_write() -> None:
    given = build_parser().parse_args(["run", "--blur-faces", "--predictions", "a", "b", "--predictions", "c"])
    assert (given.blur_faces, given.predictions, given.run2) == ("auto", [["a", "b"], ["c"]], None)
    assert build_parser().parse_args(["run", "run2"]).blur_faces == ""
    assert "matplotlib" not in sys.modules["minigpt4.tools.report"].__dict__
