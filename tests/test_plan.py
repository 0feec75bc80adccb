"""``minigpt4 plan``: what it reads, prints, proposes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from minigpt4.cli import main
from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError
from minigpt4.tools.planner.estimate import CONTEXT
from tests.golden_cases import TINY_EVA
from tests.plan_parts import language_model as language_model


@pytest.fixture
def config(tmp_path: Path, language_model: Path) -> dict[str, Any]:
    """A YAML file's content whose weights and data are nowhere."""
    model = {
        "arch": "minigpt_v2", "image_size": 56, "vit_model": "eva", "vit_config": TINY_EVA,
        "vit_weights": "nowhere/vit.pth", "llama_model": str(language_model), "lora_r": 4, "end_sym": "</s>",
        "ckpt": "nowhere/stage3.pth", "max_txt_len": 100,
    }  # fmt: skip
    faces = {
        "format": "vqa", "build_info": {"ann_path": "nowhere/faces.csv", "image_path": "nowhere"}, "batch_size": 2,
    }  # fmt: skip
    return {"model": model, "datasets": {"faces": faces}, "run": {"max_epoch": 3, "accum_grad_iters": 4}}


def plan(folder: Path, config: dict[str, Any], *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code and figures."""
    path, figures = folder / "run.yaml", folder / "plan.json"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    code = main(["plan", "--cfg-path", str(path), "--json", str(figures), *flags])
    return code, json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}


def write_faces(folder: Path, answers: list[str]) -> dict[str, str]:
    rows = "image,question,answer\n"
    for number, answer in enumerate(answers):
        Image.new("RGB", (20, 20), (9 * number, 0, 0)).save(folder / f"{number}.png")
        rows += f"{number}.png,Who is it?,{answer}\n"
    (folder / "faces.csv").write_text(rows, encoding="utf-8")
    return {"ann_path": str(folder / "faces.csv"), "image_path": str(folder)}


def test_a_plan_needs_neither_weights_nor_data(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, facts = plan(tmp_path, config)
    shown = capsys.readouterr().out
    assert code == 0
    for text in (
        "8 samples per optimiser step = 2 per micro-batch x 4 accumulated x 1 GPU",
        "optimiser steps of the run: unknown (run.iters_per_epoch is absent, and so is data)",
        "packed row of 8 samples of 135 positions (4 image + 31 prompt + 100 answer); lengths: assumed, answers of",
        "samples per row, recompute none",
    ):
        assert text in shown
    kept = ("weights", "inputs", "moments", "gradients", "activations", "context")
    assert facts["total"] == sum(facts[key] for key in kept)
    assert facts["weights"] == sum(part["bytes"] for part in facts["parts"])
    assert facts["context"] == CONTEXT and facts["variant"]["precision"] == "bf16"
    trained = sum(part["count"] for part in facts["parts"] if part["trains"])
    assert facts["moments"] >= 8 * trained
    assert facts["cards"] == {"8": "fits", "12": "fits", "16": "fits", "24": "fits", "40": "fits", "80": "fits"}


def test_lengths_and_steps_come_from_the_data_where_it_is(tmp_path: Path, config: dict[str, Any]) -> None:
    config["datasets"]["faces"]["build_info"] = write_faces(tmp_path, ["a"] * 15 + ["a b c d e f g h i j k l"])
    _, facts = plan(tmp_path, config)
    assert facts["row"]["lengths"] == "longest of 16 of 16 samples of faces"
    assert 10 < facts["row"]["sample"]["answer"] < 40
    assert facts["window"]["steps"] == 6  # 16 samples, 8 per step, 3 epochs
    assert facts["window"]["supervised"] < 8 * facts["row"]["sample"]["answer"]


def test_flags_win_over_the_data(tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config["datasets"]["faces"]["build_info"] = write_faces(tmp_path, ["a"] * 16)
    _, facts = plan(tmp_path, config, "--answer-tokens", "50", "--prompt-tokens", "10", "--gpus", "2")
    assert facts["row"]["sample"] == {"images": 1, "image_tokens": 4, "prompt": 11, "answer": 50}
    assert (facts["window"]["steps"], facts["window"]["gpus"]) == (3, 2)
    assert facts["gradients"] > 0  # DDP's buckets are always there
    _, split = plan(tmp_path, config, "--ranks", "2", "--options", "run.parallel=fsdp", "model.cache_vision=auto")
    assert split["variant"]["shards"] == 2 and split["variant"]["cached"]  # three epochs are three passes
    assert split["weights"] < facts["weights"] and split["host"] > 2 * facts["weights"] and split["filling"] > 0
    shown = capsys.readouterr().out
    assert "split over 2 of 2 GPUs" in shown and "about 3.0 passes" in shown and "filling the cache" in shown


def test_a_data_set_of_texts_has_no_image(tmp_path: Path, config: dict[str, Any]) -> None:
    config["datasets"]["faces"].update(data_type="text", format="text")
    _, facts = plan(tmp_path, config)
    assert facts["row"]["sample"]["images"] == 0


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ({"llama_model": "nowhere/Vicuna-13b"}, (), "Without any file: --llm-shape vicuna-13b (known: llama2-7b"),
        ({}, ("--llm-shape", "llama-7b"), "unknown 'llama-7b' (did you mean 'llama2-7b'?)"),
        ({}, ("--gpus", "0"), "--gpus must be >= 1, got 0"),
        ({}, ("--gpus", "6", "--gpus-per-node", "4"), "--gpus 6 do not divide into nodes of 4 (--gpus-per-node)"),
        ({}, ("--answer-tokens", "0"), "--answer-tokens must be >= 1, got 0"),
        ({"lora_r": -1}, (), "lora_r must be >= 0"),
        ({"image_size": 57}, (), "57 is not divisible by the patch size 14"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path,
    config: dict[str, Any],
    model: dict[str, Any],
    flags: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config["model"].update(model)
    assert plan(tmp_path, config, *flags)[0] == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


def test_an_empty_section_of_data_is_a_mistake(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, {**config, "datasets": {}})[0] == 2
    assert "datasets: is empty; name at least one data set" in capsys.readouterr().err


def test_a_run_that_does_not_fit_gets_options_that_make_it_fit(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["model"]["max_txt_len"] = 3000
    config["run"].update(accum_grad_iters=4, row_tokens=60000)
    _, before = plan(tmp_path, config)
    card = (before["total"] - 0.5 * before["activations"]) / 1.025e9
    code, facts = plan(tmp_path, config, "--gpu", f"{card}")
    shown = capsys.readouterr().out
    assert code == 1 and "does not fit" in shown and "The smallest change that fits: rows of at most" in shown
    smaller = facts["proposals"][0]
    assert [option.partition("=")[0] for option in smaller["options"]] == ["run.row_tokens"]
    code, after = plan(tmp_path, config, "--gpu", f"{card}", "--options", *smaller["options"])
    assert code == 0 and after["total"] == smaller["total"] and "GB card: fits" in capsys.readouterr().out


def test_a_smaller_micro_batch_keeps_the_effective_batch(tmp_path: Path, config: dict[str, Any]) -> None:
    config["model"]["max_txt_len"] = 3000
    config["run"].update(packing="padded", accum_grad_iters=2, iters_per_epoch=20)
    config["datasets"]["faces"]["batch_size"] = 8
    _, before = plan(tmp_path, config)
    card = (before["total"] - 0.5 * before["activations"]) / 1.025e9
    _, facts = plan(tmp_path, config, "--gpu", f"{card}")
    options = dict(option.split("=") for option in facts["proposals"][0]["options"])
    assert list(options) == ["datasets.faces.batch_size", "run.accum_grad_iters", "run.iters_per_epoch"]
    size, accumulation, iterations = map(int, options.values())
    assert 1 < size < 8 and 16 <= size * accumulation < 16 + size
    assert iterations == 10 * accumulation  # as many optimiser steps as before
    _, after = plan(tmp_path, config, "--options", *facts["proposals"][0]["options"])
    assert after["total"] == facts["proposals"][0]["total"] and after["window"]["steps"] == before["window"]["steps"]


def test_a_roomy_card_is_offered_larger_micro_batches_of_the_same_samples(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["run"].update(
        packing="padded", accum_grad_iters=8, iters_per_epoch=24, warmup_steps=16, save_every=8, valid={"every": 24}
    )
    _, before = plan(tmp_path, config, "--gpu", "24")
    assert before["larger"]["options"] == [
        "datasets.faces.batch_size=16", "run.accum_grad_iters=1", "run.iters_per_epoch=3", "run.warmup_steps=2",
        "run.save_every=1", "run.valid.every=3",
    ]  # fmt: skip
    assert "micro-batches of 16 instead of 2, 1 of them per optimiser step" in capsys.readouterr().out
    _, after = plan(tmp_path, config, "--gpu", "24", "--options", *before["larger"]["options"])
    assert after["total"] == before["larger"]["total"] and after["larger"] is None
    assert after["window"]["steps"] == before["window"]["steps"] and after["gradients"] == 0 < before["gradients"]


@pytest.mark.slow  # four plans
def test_larger_rows_are_no_larger_than_the_card(tmp_path: Path, config: dict[str, Any]) -> None:
    config["model"]["max_txt_len"] = 3000
    config["run"].update(packing="padded", accum_grad_iters=8)
    _, before = plan(tmp_path, config)
    card = (before["total"] + 2 * before["activations"]) * 1.05 / 1.025e9
    _, facts = plan(tmp_path, config, "--gpu", f"{card}")
    assert [option for option in facts["larger"]["options"] if "grad" in option] == ["run.accum_grad_iters=4"]
    config["run"].update(packing="auto", row_tokens=7000)
    _, packed = plan(tmp_path, config, "--gpu", f"{card}")
    (option,) = packed["larger"]["options"]
    assert option.startswith("run.row_tokens=") and 7000 < int(option.partition("=")[2]) < 30_000
    _, full = plan(tmp_path, config, "--gpu", f"{packed['total'] * 1.04 / 1.025e9}")
    assert full["larger"] is None and full["proposals"] == []


def test_a_probe_of_one_process_does_not_measure_fsdp(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["run"].update(device="cpu", parallel="fsdp")
    assert plan(tmp_path, config, "--probe", "--gpus", "2")[0] == 2
    assert "cannot measure run.parallel: fsdp" in capsys.readouterr().err


def test_nothing_is_proposed_where_nothing_helps(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, facts = plan(tmp_path, config, "--gpu", "0.5")
    assert code == 1 and facts["proposals"] == []
    assert (
        "no change of rows, precision, quantisation, recompute, cache or fsdp makes it fit" in capsys.readouterr().out
    )


def test_the_reference_is_accounted_and_explained(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, facts = plan(tmp_path, config, "--model-reference", "fork")
    shown = capsys.readouterr().out
    assert "casts every frozen fp16 weight to fp32" in shown and "Memory of the fork loop, by formula: 2 x 135" in shown
    items = facts["reference"]
    language = next(part["count"] for part in facts["parts"] if part["name"] == "llama_model")
    assert (items["language model"], items["pinned fp16 copies"]) == (4 * language, 2 * language)


def test_a_probe_prints_measurement_beside_prediction(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["run"]["device"] = "cpu"
    code, facts = plan(tmp_path, config, "--probe", "--answer-tokens", "20")
    assert code == 0 and facts["context"] == 0 and facts["variant"]["precision"] == "fp32"
    assert facts["measured"] == pytest.approx(facts["allocated"], rel=0.01)
    assert "Probe (random weights, two optimiser steps): predicted" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
def test_a_probe_without_a_gpu_is_refused(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(tmp_path, config, "--probe")[0] == 2
    assert "--probe measures on a GPU, and none is usable here" in capsys.readouterr().err


def test_only_a_plan_does_without_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="model.vit_weights: 'nowhere/vit.pth' not found"):
        load_config(path, check_data=False)
    cfg = load_config(path, check_data=False, check_weights=False)
    assert cfg.model.vit_weights == "nowhere/vit.pth"


def test_the_fullest_row_may_come_from_the_set_with_the_largest_batches(tmp_path: Path, config: dict[str, Any]) -> None:
    config["run"]["accum_grad_iters"] = 1
    rare = {**config["datasets"]["faces"], "batch_size": 6, "sample_ratio": 1}
    config["datasets"]["faces"]["sample_ratio"] = 9
    _, facts = plan(tmp_path, {**config, "datasets": {**config["datasets"], "rare": rare}})
    assert facts["row"]["samples"] == 6 and facts["window"]["samples_per_micro_batch"] == pytest.approx(2.4)
