"""``include``: one line that puts the settings of another file under one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigpt4.common.config import dump_config, load_config
from minigpt4.common.errors import ConfigError
from tests.config_fakes import BASE, register_fakes, write

PRESET = "model:\n  lora_alpha: 5\n  lora_r: 3\nrun:\n  max_epoch: 9\n  valid: {max_samples: 4, num_canaries: 1}\n"


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small registered classes and a folder with one model and one data set."""
    register_fakes(monkeypatch, tmp_path)


def write_preset(folder: Path, text: str = PRESET) -> None:
    (folder / "presets").mkdir(exist_ok=True)
    (folder / "presets" / "small.yaml").write_text(text, encoding="utf-8")


def including(name: str = "presets/small.yaml") -> str:
    return f"include: {name}\n{BASE}"


def test_own_keys_win_over_included_ones(tmp_path: Path) -> None:
    write_preset(tmp_path)
    cfg = load_config(write(tmp_path, including() + "  valid: {max_samples: 1}\n"))
    assert (cfg.model.lora_r, cfg.run.max_epoch, cfg.run.valid.max_samples) == (8, 2, 1)
    assert cfg.model.lora_alpha == 5
    options = ["run.valid.max_samples=7", "model.lora_alpha=6"]
    cfg = load_config(write(tmp_path, including() + "  valid:\n"), options)
    assert (cfg.model.lora_alpha, cfg.run.valid.max_samples) == (6, 7)


def test_a_section_may_come_from_the_included_file_alone(tmp_path: Path) -> None:
    write_preset(tmp_path)
    cfg = load_config(write(tmp_path, including().partition("run:")[0]))
    assert (cfg.run.max_epoch, cfg.run.valid.max_samples) == (9, 4)
    assert "include" not in dump_config(cfg)


def test_a_file_is_looked_for_beside_the_one_that_names_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt4.common.yaml_include.REPOSITORY_ROOT", tmp_path / "repository")
    shipped = tmp_path / "repository" / "train_configs"
    shipped.mkdir(parents=True)
    write_preset(shipped)
    path = write(tmp_path, including())
    assert load_config(path).model.lora_alpha == 5
    write_preset(tmp_path, "model: {lora_alpha: 1}\n")
    assert load_config(path).model.lora_alpha == 1


@pytest.mark.parametrize(
    ("text", "preset", "message"),
    [
        (
            including("presets/big.yaml"),
            PRESET,
            r"^face.yaml:1: include: 'presets/big.yaml' not found in .*; shipped:",
        ),
        (including("presets"), PRESET, "^face.yaml:1: include: 'presets' not found in"),
        (
            including("[a.yaml, b.yaml]"),
            PRESET,
            "^face.yaml:1: include: found .'a.yaml', 'b.yaml'., expected one file",
        ),
        (
            including(),
            f"include: other.yaml\n{PRESET}",
            r"^presets/small.yaml:1: include: .*face.yaml:1. includes no",
        ),
        (including(), "model:\n  lora_alfa: 5\n", "^presets/small.yaml:2: model.lora_alfa: unknown key"),
        (including(), "run: {max_epoch: 0}\nmodel: {lora_alpha: x}\n", "^presets/small.yaml:2: model.lora_alpha: "),
        (including(), "- a\n", "^presets/small.yaml: holds a list"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, preset: str, message: str) -> None:
    write_preset(tmp_path, preset)
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))
