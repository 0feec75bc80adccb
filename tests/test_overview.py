"""The header of a run, ``--dry-run``, and the checks that stop a run which cannot learn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from minigpt4.cli import train_command
from minigpt4.common.dist import single
from minigpt4.common.types import IMAGE_PROMPT, Batch, Sample, Turn
from minigpt4.conversation.encoding import Encoder
from minigpt4.models.losses import LossOutput
from minigpt4.runners import sanity
from minigpt4.runners.overview import Survey, example_text, survey
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import LetterTokenizer, TinyDataset, TinyModel, tiny_config
from tests.golden_cases import LLAMA, TINY_EVA

ENCODER = Encoder(LetterTokenizer(), num_image_tokens=3, end_sym=".", max_txt_len=8)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A YAML file's content for a tiny MiniGPT-v2 on four faces; its language model has a config and no weights."""
    llm = tmp_path / "llm"
    llm.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (llm / name).write_bytes((LLAMA / name).read_bytes())
    rows = "image,question,answer\n"
    for number in range(4):
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
        rows += f"{number}.png,Who is it?,face {number}\n"
    (tmp_path / "faces.csv").write_text(rows, encoding="utf-8")
    model = {
        "arch": "minigpt_v2", "image_size": 56, "vit_model": "eva", "vit_config": TINY_EVA, "vit_weights": "random",
        "llama_model": str(llm), "lora_r": 4, "chat_template": True, "end_sym": "</s>",
    }  # fmt: skip
    info = {"ann_path": str(tmp_path / "faces.csv"), "image_path": str(tmp_path)}
    faces = {"format": "vqa", "build_info": info, "batch_size": 2}
    run = {"max_epoch": 3, "iters_per_epoch": 4, "accum_grad_iters": 2, "output_dir": str(tmp_path / "output")}
    return {"model": model, "datasets": {"faces": faces}, "run": {**run, "device": "cpu"}}


def _dry_run(folder: Path, config: dict[str, Any], *options: str) -> int:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return train_command(["--cfg-path", str(path), "--dry-run", *options])


def test_a_dry_run_shows_data_batch_parameters_and_an_example(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _dry_run(tmp_path, config) == 0  # the language model's folder holds no weights at all
    shown = capsys.readouterr().out
    for text in (
        "data    faces           4 samples  ratio 100.0 %      6.00 passes",
        "batch   4.0 samples per step = 2.00 per micro-batch x 2 accumulated x 1 rank",
        "steps   3 epochs x 2 windows = 6 optimiser steps",
        "example faces: <s>[INST] <Img>[image x 4]</Img> Who is it?  [/INST]>>face 0</s><<",
        "nothing was trained, nothing was written",
    ):
        assert text in shown
    lines = {line.split("part    ")[1].split()[0]: line for line in shown.splitlines() if "part    " in line}
    assert list(lines) == ["visual_encoder", "ln_vision", "llama_model", "LoRA", "llama_proj", "all"]
    assert "3,072 trainable               0 frozen" in lines["LoRA"]
    assert not (tmp_path / "output").exists()


def test_a_dry_run_says_what_was_recognised_and_how_groups_are_drawn(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"{n}.png,Who is it?,{'somebody' if n else 'nobody'}\n" for n in range(4))
    (tmp_path / "faces.csv").write_text(f"image,question,answer\n{rows}", encoding="utf-8")
    config["datasets"]["faces"] |= {"format": "auto", "balance": {"by": "answer"}}
    assert _dry_run(tmp_path, config) == 0
    shown = capsys.readouterr().out
    assert "dataset 'faces': table of 4 records with 'question' -> vqa" in shown
    balance = "nobody 50.0 % (1 records, 12.00 passes), somebody 50.0 % (3 records, 4.00 passes)"
    assert f"balance faces  by answer, temperature 0: {balance}" in shown


def test_a_dry_run_under_a_launcher_counts_all_ranks(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert _dry_run(tmp_path, config) == 0
    assert "batch   16.0 samples per step = 2.00 per micro-batch x 2 accumulated x 4 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets": {"faces": {"build_info": {"ann_path": "none.csv"}, "format": "vqa"}}}, "'none.csv' not found"),
        ({"model": {"lora_target_modules": ["q_prj"]}}, "lora_target_modules: 'q_prj' is in no layer"),
        ({"run": {"lr_sched": "linear_warmup_step_lr"}}, "needs run.lr_decay_rate"),
        ({"model": {"max_txt_len": 1}}, "no label of 4 records holds the end symbol '</s>'"),
    ],
)
def test_a_dry_run_finds_what_would_stop_the_run(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    for section, values in change.items():
        config[section] = {**config[section], **values}
    assert _dry_run(tmp_path, config) == 2
    assert message in capsys.readouterr().err


def test_an_absent_package_of_a_tracker_stops_a_dry_run_too(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _dry_run(tmp_path, config, "--options", "run.trackers=[wandb]") == 2


def test_every_run_starts_with_the_same_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = tiny_config(tmp_path)
    with caplog.at_level("INFO", "minigpt4"):
        RunnerBase(replace(cfg, model=replace(cfg.model, max_txt_len=6)), single("cpu"))
    for text in (
        "batch   5.3 samples per step = 2.67 per micro-batch x 2 accumulated x 1 rank",
        "2.29 passes",  # 16 micro-batches, two thirds of them 3 samples of 14
        "answers cut by max_txt_len: 13 of 23 records looked at (56.5 %)",
        "data set 'one': 10 of 14 answers are cut by model.max_txt_len",
        "example two: <s><Img>[image x 1]</Img> say 0 >>achfgd<<",
        "part    projection             156 trainable",
    ):
        assert text in caplog.text


def test_an_example_marks_what_is_supervised_in_text_and_in_colour() -> None:
    turns = (Turn(f"{IMAGE_PROMPT} Who? ", "me"), Turn("Why? ", "so"))
    encoded = replace(ENCODER, max_txt_len=40).encode_turns(turns)
    item = Survey(TinyDataset("one", tiny_config(Path()).datasets["one"], 3), 1, 9, 3, 6, 0, 1, [])
    text = example_text(replace(item, example=ENCODER.spell(encoded.ids, encoded.labels)))
    assert text.plain == "example one: <s><Img>[image x 3]</Img> Who? >>me.<<<s>Why? >>so.<<"
    assert [text.plain[span.start : span.end] for span in text.spans if span.style == "bold green"] == [
        ">>me.<<",
        ">>so.<<",
    ]


def test_a_long_example_loses_its_middle() -> None:
    item = Survey(TinyDataset("one", tiny_config(Path()).datasets["one"], 3), 1, 9, 3, 6, 0, 1, [("a" * 5000, True)])
    assert len(example_text(item).plain) < 800


def _survey(answer: str, prompt: str = "Who? ", max_txt_len: int = 8) -> Survey:
    class Fixed(TinyDataset):
        def sample(self, pass_index: int, index: int, seed: int) -> Sample:
            return Sample((Turn(prompt, answer),), (), "x")

    dataset = Fixed("mine", tiny_config(Path()).datasets["one"], 5)
    return survey([dataset], replace(ENCODER, max_txt_len=max_txt_len), 1)[0]


def test_labels_without_an_end_symbol_are_told() -> None:
    assert sanity.check_labels([_survey("me")], ENCODER) == []
    (line,) = sanity.check_labels([_survey("a long answer")], ENCODER)
    assert "data set 'mine': no label of 5 records holds the end symbol '.' (every answer is cut" in line
    (line,) = sanity.check_labels([_survey("me")], replace(ENCODER, end_sym=""))
    assert "model.end_sym is empty" in line


def test_a_vanishing_share_of_supervised_positions_is_told() -> None:
    (line,) = sanity.check_labels([_survey("me", prompt="why " * 100, max_txt_len=2)], ENCODER)
    assert "data set 'mine': 0.50 % of the text positions are supervised (least: 1 %)" in line


def test_a_first_loss_of_guessing_is_told_and_others_are_not() -> None:
    (line,) = sanity.check_first_loss(10.45, 32000)
    assert "first loss 10.45 is that of guessing (ln of 32000 words = 10.37)" in line and "llama_weights" in line
    assert sanity.check_first_loss(2.5, 32000) == [] and sanity.check_first_loss(13.0, 32000) == []


def test_checks_raise_warn_or_are_off(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(sanity.SanityError, match="(?s)one.*two.*run.sanity: warn goes on"):
        sanity.report("raise", ["one", "two"])
    sanity.report("warn", ["one"])
    sanity.report("off", ["three"])
    assert "sanity: one" in caplog.text and "three" not in caplog.text


@pytest.mark.parametrize(
    ("mode", "weights", "stops"), [("raise", "", True), ("warn", "", False), ("raise", "random", False)]
)
def test_a_run_whose_first_loss_is_that_of_guessing_stops_unless_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, weights: str, stops: bool
) -> None:
    forward = TinyModel.forward

    def guessing(self: TinyModel, batch: Batch) -> LossOutput:
        output = forward(self, batch)
        total = output.loss_sum * 0 + math.log(128) * batch.num_target_tokens
        return replace(output, loss_sum=total)

    monkeypatch.setattr(TinyModel, "forward", guessing)
    cfg = tiny_config(tmp_path, sanity=mode)
    cfg = replace(cfg, model=replace(cfg.model, llama_weights=weights))
    runner = RunnerBase(cfg, single("cpu"))
    if stops:
        with pytest.raises(sanity.SanityError, match="that of guessing"):
            runner.train()
        assert runner.progress.window == 1
    else:
        assert runner.train() == 0


def test_weights_trained_on_pictures_of_another_size_are_told(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    runner = RunnerBase(tiny_config(tmp_path), single("cpu"))
    assert runner.train() == 0
    cfg = tiny_config(tmp_path)
    same = replace(cfg, model=replace(cfg.model, ckpt=str(runner.job_dir)))
    assert sanity.check_image_size(same) == []
    (line,) = sanity.check_image_size(replace(same, model=replace(same.model, image_size=8)))
    assert "model.image_size is 8, but the weights of model.ckpt were trained at 4" in line
