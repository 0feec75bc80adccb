"""Every YAML file of the repository loads with the real classes; without weights it complains about files alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from minigpt4 import catalog
from minigpt4.common import logger
from minigpt4.common.config import dump_config, load_config
from minigpt4.common.config_run import TRACKERS
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import Config
from minigpt4.common.yaml_source import Problems, read_source, resolve_references
from tests.config_fakes import REPOSITORY

USER_FILES = sorted(
    path for folder in ("train_configs", "eval_configs") for path in (REPOSITORY / folder).glob("*.yaml")
)
PACKAGE_FILES = sorted((REPOSITORY / "minigpt4" / "configs").rglob("*.yaml"))
WEIGHTS = re.compile(r"\$\{oc\.env:MINIGPT4_WEIGHTS,[^}]*\}/([\w./-]+)")
WITH_WEIGHTS = [path for path in USER_FILES if WEIGHTS.search(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module", autouse=True)
def names() -> None:
    """The real classes."""
    catalog.load()


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(REPOSITORY)) for path in paths]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for weights, away from whatever the machine has."""
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("MINIGPT4_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "weights"


def with_weights(path: Path, weights: Path) -> Config:
    """Loads ``path`` after an empty file or folder was put wherever it names one."""
    for name in WEIGHTS.findall(path.read_text(encoding="utf-8")):
        target = weights / name
        if target.suffix in (".pth", ".safetensors"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        else:
            target.mkdir(parents=True, exist_ok=True)
    return load_config(path, check_data=False)


@pytest.mark.parametrize("path", USER_FILES, ids=ids(USER_FILES))
def test_a_shipped_file_loads_where_its_weights_exist(
    path: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = with_weights(path, weights)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("minigpt4")] == []
    again = weights.parent / "again.yaml"
    again.write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(again, check_data=False) == cfg


@pytest.mark.parametrize("path", WITH_WEIGHTS, ids=ids(WITH_WEIGHTS))
def test_without_weights_only_missing_files_are_reported(path: Path, weights: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, check_data=False)
    lines = str(caught.value).splitlines()
    assert not [line for line in lines if f"'{weights}/" not in line or "' not found" not in line]


@pytest.mark.parametrize("path", USER_FILES, ids=ids(USER_FILES))
def test_a_shipped_file_names_no_place_of_one_machine(path: Path) -> None:
    assert not re.search(r"(?<![\w.}/])/(?!/)\w+/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=ids(PACKAGE_FILES))
def test_a_default_file_is_a_mapping_without_duplicates(path: Path) -> None:
    problems = Problems()
    source = read_source(path, problems)
    resolve_references(source, problems)
    assert source.data and problems.lines == []


def test_the_trackers_of_the_configuration_are_those_of_the_logger() -> None:
    assert sorted(TRACKERS) == sorted(logger._TRACKERS)


def test_every_model_type_of_the_first_versions_has_its_defaults() -> None:
    found = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        for path in PACKAGE_FILES
        if path.parent.name == "models"
    }
    assert found["minigpt4-pretrain_vicuna0"]["has_qformer"] is True
    assert found["minigpt4-pretrain_llama2"]["has_qformer"] is False
    assert found["minigpt_v2-pretrain"]["image_size"] == 448


@pytest.mark.parametrize(
    ("name", "ratios", "accumulation"),
    [("minigptv2_finetune_gpt4vision", [0, 0, 10], 8), ("minigptv2_finetune_gpt4vision_Full", [30, 10, 20], 16)],
)
def test_the_face_recipe_is_the_published_one(name: str, ratios: list[int], accumulation: int, weights: Path) -> None:
    cfg = with_weights(REPOSITORY / "train_configs" / f"{name}.yaml", weights)
    assert list(cfg.datasets) == ["sharegpt_detail", "gpt4visionface_detail", "RealisticEmotions_detail"]
    assert [dataset.sample_ratio for dataset in cfg.datasets.values()] == ratios
    run, model = cfg.run, cfg.model
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.warmup_steps) == (3e-5, 1e-6, 1e-6, 1000)
    assert (run.iters_per_epoch, run.max_epoch, run.accum_grad_iters, run.seed) == (640, 200, accumulation, 43)
    assert (model.image_size, model.lora_r, model.lora_alpha, model.max_txt_len, model.end_sym) == (
        448,
        64,
        16,
        3072,
        "</s>",
    )
    assert model.chat_template and model.prompt_template == "[INST] {} [/INST]"


def test_stage_one_trains_on_captions_without_a_prompt(weights: Path) -> None:
    for name in ("minigpt4_stage1_pretrain", "minigpt4_llama2_stage1_pretrain"):
        cfg = with_weights(REPOSITORY / "train_configs" / f"{name}.yaml", weights)
        assert {key: (value.sample_ratio, value.batch_size) for key, value in cfg.datasets.items()} == {
            "laion": (115, 64),
            "cc_sbu": (14, 64),
        }
        assert (cfg.model.prompt_path, cfg.model.max_txt_len, cfg.model.end_sym) == ("", 32, "\n")
        assert (cfg.run.init_lr, cfg.run.min_lr, cfg.run.warmup_steps, cfg.run.max_epoch) == (1e-4, 8e-5, 5000, 4)


@pytest.mark.parametrize(
    ("name", "template", "end_sym"),
    [
        ("minigpt4_stage2_finetune", "###Human: {} ###Assistant: ", "###"),
        ("minigpt4_llama2_stage2_finetune", "[INST] {} [/INST] ", "</s>"),
    ],
)
def test_stage_two_wraps_its_prompts(name: str, template: str, end_sym: str, weights: Path) -> None:
    cfg = with_weights(REPOSITORY / "train_configs" / f"{name}.yaml", weights)
    assert (cfg.model.prompt_template, cfg.model.end_sym, cfg.model.max_txt_len) == (template, end_sym, 160)
    assert Path(cfg.model.prompt_path).is_file()
    assert cfg.datasets["cc_sbu_align"].batch_size == 12 and cfg.run.max_epoch == 5
