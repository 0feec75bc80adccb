"""LoRA that would act otherwise than it was trained is refused; every load is reported; nothing frozen is cast up."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt4.chat.loading import load_assistant
from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.dist import single
from minigpt4.common.errors import CheckpointError
from minigpt4.models.base_model import BaseModel
from minigpt4.models.load_report import LoadReport, check_not_upcast, frozen_bytes_by_dtype, report_table
from minigpt4.models.minigpt_v2 import MiniGPTv2
from minigpt4.runners.runner_base import RunnerBase
from tests.engine_parts import TinyModel, tiny_config
from tests.golden_cases import build_config, build_model, load_case

V2 = "c_minigptv2_lora_instruction"
CPU = torch.device("cpu")


def _trained() -> dict[str, Tensor]:
    return {n: v for n, v in load_case(V2).tensors("weights").items() if n.startswith("llama_")}


def _file(folder: Path, config: dict[str, Any] | None = None, state: dict[str, Tensor] | None = None) -> str:
    """A published training file; ``config``: the settings that it records under ``model``."""
    content = {"model": _trained() if state is None else state, "epoch": 0}
    torch.save(content if config is None else {**content, "config": {"model": config}}, folder / "checkpoint_0.pth")
    return str(folder / "checkpoint_0.pth")


def _start(ckpt: str, **changes: Any) -> BaseModel:
    return MiniGPTv2.from_config(build_config(load_case(V2), ckpt=ckpt, **changes), CPU, torch.float32)


@pytest.fixture
def no_big_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the language model is an error: what is wrong must be told before."""

    def refuse(*_: object) -> None:
        raise AssertionError("the language model was read")

    monkeypatch.setattr("minigpt4.models.llm._from_files", refuse)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 2}, "holds LoRA of rank 4 on q_proj, v_proj, model.lora_r is 2"),
        ({"lora_r": 0}, r"holds LoRA of rank 4 on q_proj, v_proj, the model has none \(check lora_r\)"),
        ({"lora_target_modules": ["q_proj", "k_proj"]}, "on q_proj, v_proj; model.lora_target_modules: k_proj, q_proj"),
        ({"lora_target_modules": ["q_proj", "v_proj", "o_proj"]}, r"6 trained tensors are missing in the file.*o_proj"),
    ],
)
def test_lora_of_another_shape_is_told_before_big_files_are_read(
    changes: dict[str, Any], message: str, tmp_path: Path, no_big_files: None
) -> None:
    with pytest.raises(CheckpointError, match=message):
        _start(_file(tmp_path), **changes)


def test_lora_of_a_larger_language_model_is_told_apart_from_a_wrong_rank(tmp_path: Path, no_big_files: None) -> None:
    state = {n: torch.ones(v.shape[0], 80) if ".lora_A." in n else v for n, v in _trained().items()}
    with pytest.raises(CheckpointError, match=r"file \[4, 80\], model \[4, 64\] \(another language model\)"):
        _start(_file(tmp_path, state=state))


@pytest.mark.parametrize("rename", [("self_attn", "attention"), ("layers.", "layers.9"), (".q_proj.lora", ".qkv.lora")])
def test_a_file_of_foreign_lora_names_is_refused(rename: tuple[str, str], tmp_path: Path, no_big_files: None) -> None:
    state = {name.replace(*rename): value for name, value in _trained().items()}
    with pytest.raises(CheckpointError, match="LoRA matrices in the file do not apply"):
        _start(_file(tmp_path, state=state))


def test_names_of_a_wrapped_model_load(tmp_path: Path) -> None:
    model = _start(_file(tmp_path, state={f"module.{name}": value for name, value in _trained().items()}))
    assert model.load_reports[-1].loaded == {"LoRA": 12, "llama_proj": 2}


def test_an_alpha_that_differs_from_the_recorded_one_is_refused(tmp_path: Path, no_big_files: None) -> None:
    path = _file(tmp_path, {"lora_r": 4, "lora_alpha": 16})
    with pytest.raises(CheckpointError, match="LoRA was trained with lora_alpha 16, model.lora_alpha is 32"):
        _start(path, lora_alpha=32)


@pytest.mark.parametrize("key", ["lora_alpha", "lora_target_modules"])
def test_our_own_checkpoints_record_alpha_and_targets(key: str, tmp_path: Path, no_big_files: None) -> None:
    recorded = {"lora_alpha": 8} if key == "lora_alpha" else {"lora_alpha": 16, "lora_target_modules": ["k_proj"]}
    text = json.dumps({"model": recorded})  # JSON is YAML
    step = save_checkpoint(tmp_path, 1, weights=_trained(), config_text=text, manifest={}, resume=None, keep_last=1)
    with pytest.raises(CheckpointError, match=f"LoRA was trained with {key} "):
        _start(str(step))


def test_chat_refuses_a_setting_with_another_alpha_than_its_checkpoint(tmp_path: Path, no_big_files: None) -> None:
    base = build_config(load_case(V2))
    recorded = {"arch": "minigpt_v2", "llama_model": base.llama_model, "lora_r": 4, "lora_alpha": 8}
    text = json.dumps({"model": recorded, "datasets": {}, "run": {}})
    step = save_checkpoint(tmp_path, 1, weights=_trained(), config_text=text, manifest={}, resume=None, keep_last=1)
    with pytest.raises(CheckpointError, match="LoRA was trained with lora_alpha 8, model.lora_alpha is 16"):
        load_assistant(str(step), options=["model.lora_alpha=16"], device=CPU)


def test_an_alpha_that_no_file_records_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="minigpt4")
    model = _start(_file(tmp_path))
    assert "does not record lora_alpha; its LoRA is used with model.lora_alpha 16" in caplog.text
    assert model.load_reports[-1].notes


def test_every_load_is_in_one_table_and_in_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="minigpt4")
    stage1 = {name: value for name, value in _trained().items() if name.startswith("llama_proj.")}
    model = _start(_file(tmp_path, state=stage1))
    table = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert [line.split() for line in table if "llama" in line] == [
        ["llama_base", "llama_model", "30", "0", "0", "0", "0"],
        ["checkpoint_0.pth", "llama_proj", "2", "0", "0", "0", "0"],
    ]
    warning = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == [f"{tmp_path / 'checkpoint_0.pth'}: no tensors of LoRA; it keeps its initial values"]
    stored = json.loads(json.dumps([report.as_dict() for report in model.load_reports]))
    assert stored[-1]["parts"] == {"LoRA": {"missing": 12}, "llama_proj": {"loaded": 2}}
    assert stored[-1]["source"] == str(tmp_path / "checkpoint_0.pth") and stored[-1]["remarks"] == warning


def test_the_manifest_of_a_run_holds_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = LoadReport("tower.pth", loaded={"visual_encoder": 3})
    monkeypatch.setattr(TinyModel, "load_reports", [report])
    runner = RunnerBase(tiny_config(tmp_path), single("cpu"))
    assert runner.manifest["load_report"] == [report.as_dict()]


def test_a_report_counts_every_kind_by_part() -> None:
    report = LoadReport(
        "/weights/x.pth", missing=["llama_proj.bias"], unexpected=["a.b", "a.c"], mismatched=["llama_proj.weight"]
    )
    report.add_loaded(["visual_encoder.cls_token"])
    assert [line.split() for line in report_table([report])[1:]] == [
        ["x.pth", "a", "0", "0", "2", "0", "0"],
        ["x.pth", "llama_proj", "0", "1", "0", "1", "0"],
        ["x.pth", "visual_encoder", "1", "0", "0", "0", "0"],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_weights_stay_in_the_dtype_that_was_asked_for(dtype: torch.dtype) -> None:
    cfg = build_config(load_case(V2))
    model = MiniGPTv2.from_config(cfg, CPU, dtype)
    sizes = frozen_bytes_by_dtype(model.llama_model)
    assert sizes == {str(dtype).removeprefix("torch."): 2 * (800512 // 4)}
    assert {p.dtype for _, p in model.trainable_parameters_by_name()} == {torch.float32}
    for parameter in model.llama_model.parameters():
        parameter.data = parameter.data.float()
    with pytest.raises(CheckpointError, match=r"were cast up: 0\.000801 GB in float32; asked: (b?float16)"):
        check_not_upcast(model, cfg, dtype)


def test_a_part_kept_in_float32_by_design_is_no_mistake() -> None:
    cfg = build_config(load_case(V2))
    model = MiniGPTv2.from_config(cfg, CPU, torch.bfloat16)
    norm = model._lm.get_decoder().norm.weight
    norm.data = norm.data.float()
    check_not_upcast(model, cfg, torch.bfloat16)  # raises for more than that
    assert frozen_bytes_by_dtype(model.llama_model)["float32"] == 4 * norm.numel()


def test_a_language_model_that_trains_is_float32_on_purpose() -> None:
    cfg = build_config(load_case(V2), freeze_llm=False, lora_r=0)
    model = MiniGPTv2.from_config(cfg, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in model.llama_model.parameters()} == {torch.float32}


def test_the_build_refuses_a_model_that_was_cast_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt4.models import llm

    real = llm._from_files

    def cast_up(*arguments: Any) -> Any:
        model, report = real(*arguments)
        return model.float(), report

    monkeypatch.setattr(llm, "_from_files", cast_up)
    with pytest.raises(CheckpointError, match="were cast up"):
        MiniGPTv2.from_config(build_config(load_case(V2)), CPU, torch.bfloat16)


def test_building_on_the_meta_device_reports_nothing() -> None:
    model = MiniGPTv2.from_config(build_config(load_case(V2)), torch.device("meta"), torch.float32)
    assert model.load_reports == []
    assert [r.source for r in build_model(load_case(V2)).load_reports][-1] == V2
