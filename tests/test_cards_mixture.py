"""MiniGPT-v2's third stage, all 22 data sets at once, on made-up data and a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from minigpt4 import catalog
from minigpt4.cli import train_command
from minigpt4.common.config import load_config
from minigpt4.common.dist import single
from minigpt4.runners.runner_base import RunnerBase
from tests.config_fakes import REPOSITORY
from tests.golden_cases import LLAMA, TINY_EVA
from tests.published_parts import data_folder
from tests.test_config_reference_files import MIXTURE

SHIPPED = REPOSITORY / "train_configs" / "minigptv2_finetune.yaml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped file with a tiny model and two windows; data lies where MINIGPT4_DATA says."""
    catalog.load()
    monkeypatch.setenv("MINIGPT4_DATA", str(data_folder(tmp_path / "data")))
    content = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    del content["model"]["ckpt"]
    content["model"] |= {
        "image_size": 56, "vit_model": "eva", "vit_config": TINY_EVA, "vit_weights": "random", "lora_r": 4,
        "llama_model": str(LLAMA), "use_grad_checkpoint": False,
    }  # fmt: skip
    content["run"] |= {
        "max_epoch": 1, "iters_per_epoch": 8, "accum_grad_iters": 4, "warmup_steps": 2, "num_workers": 0,
        "device": "cpu", "output_dir": str(tmp_path / "output"),
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_the_mixture_is_the_published_one(config: Path) -> None:
    cfg = load_config(config)
    assert {name: (block.sample_ratio, block.batch_size) for name, block in cfg.datasets.items()} == MIXTURE
    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    run, model = shipped["run"], shipped["model"]
    assert [run[key] for key in ("init_lr", "min_lr", "warmup_lr")] == ["1e-5", "1e-6", "1e-6"]  # PyYAML reads text
    assert [run[key] for key in ("warmup_steps", "iters_per_epoch", "max_epoch", "seed")] == [1000, 1000, 50, 42]
    assert (model["lora_r"], model["lora_alpha"], model["max_txt_len"]) == (64, 16, 1024)


def test_a_dry_run_shows_all_sets(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command(["--cfg-path", str(config), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"data    {name} " in shown and f"example {name}:" in shown for name in MIXTURE)
    assert "= 3.90 per micro-batch" in shown  # the recipe's 3.904 samples
    assert "[INST] <Img>[image x 4]</Img> [vqa] " in shown and "is the sky dark?  [/INST]" in shown


def test_the_mixture_trains_two_windows(config: Path) -> None:
    torch.set_num_threads(1)
    runner = RunnerBase(load_config(config), single("cpu"))
    assert runner.train() == 0 and runner.progress.window == 2
    assert (runner.job_dir / "checkpoints" / "last" / "model.safetensors").is_file()


def test_the_check_says_which_rule_found_how_many_pictures(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load_config(config)
    said = next(text for text in caplog.messages if text.startswith("dataset 'coco_vqa': "))
    assert said.endswith("2 pictures looked for, found by: train/{basename} 1, val2014/{basename} 1")
