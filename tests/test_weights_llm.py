"""Language-model directories: every published layout loads whole, or is refused before anything big is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.llm import build_llm
from minigpt4.models.load_report import frozen_bytes_by_dtype
from minigpt4.models.minigpt_v2 import MiniGPTv2
from tests.golden_cases import LLAMA, build_config, build_model, encode, images_of, load_case, padded

V2 = "c_minigptv2_lora_instruction"
CPU = torch.device("cpu")
SAFE_INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def _shards(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(state)
    return [{name: state[name] for name in names[start::3]} for start in range(3)]


def write_llm(folder: Path, layout: str, state: dict[str, Tensor] | None = None) -> Path:
    """The tiny Llama as it is published: 'safetensors' or 'bin', 'sharded ' in front for three files and an index."""
    folder.mkdir()
    for file in LLAMA.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, folder)
    state = load_file(LLAMA / "model.safetensors") if state is None else state
    form = layout.split()[-1]
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    parts = _shards(state) if layout.startswith("sharded") else [state]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-00003{suffix}" if len(parts) > 1 else f"{stem}{suffix}"
        weight_map.update(dict.fromkeys(part, name))
        if form == "safetensors":
            save_file(
                {key: value.contiguous() for key, value in part.items()}, folder / name, metadata={"format": "pt"}
            )
        else:
            torch.save(part, folder / name)
    if len(parts) > 1:
        index = SAFE_INDEX if form == "safetensors" else BIN_INDEX
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def start(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> MiniGPTv2:
    cfg = build_config(load_case(V2), llama_model=str(folder), **changes)
    return MiniGPTv2.from_config(cfg, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_every_layout_gives_the_same_weights_in_the_asked_dtype(
    layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = load_file(LLAMA / "model.safetensors")
    state = {name: value.half() for name, value in whole.items()}
    assert any(name.endswith("rotary_emb.inv_freq") for name in state)  # buffers that files of 2023 hold
    folder = write_llm(tmp_path / "llm", layout, state)
    llm, report = build_llm(build_config(load_case(V2), llama_model=str(folder), lora_r=0), CPU, dtype)
    loaded = dict(llm.named_parameters())
    assert len(loaded) == 30
    assert all(torch.equal(value, whole[name].half().to(dtype)) for name, value in loaded.items())
    assert report is not None and report.parts() == {"llama_model": {"loaded": 30}}


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _cut(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _pointer(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")


def _garble(folder: Path, name: str) -> None:
    (folder / name).write_text("{")


def _rename_tensor(folder: Path, name: str) -> None:
    state = load_file(folder / name)
    state["other"] = state.pop(sorted(state)[0])
    save_file(state, folder / name)


@pytest.mark.parametrize(
    ("layout", "damage", "name", "message"),
    [
        (
            "sharded safetensors",
            _remove,
            "model-00002-of-00003.safetensors",
            "names 3 files, 1 of them are missing: mo",
        ),
        ("sharded bin", _remove, "pytorch_model-00002-of-00003.bin", "names 3 files, 1 of them are missing: pytorch_"),
        ("sharded safetensors", _cut, "model-00003-of-00003.safetensors", r"has \d+ bytes, expected \d+; download"),
        ("sharded bin", _cut, "pytorch_model-00003-of-00003.bin", "is cut short"),
        ("safetensors", _cut, "model.safetensors", r"has \d+ bytes, expected \d+"),
        ("bin", _cut, "pytorch_model.bin", "is cut short"),
        ("sharded safetensors", _pointer, "model-00001-of-00003.safetensors", "is a Git LFS pointer"),
        ("sharded safetensors", _garble, SAFE_INDEX, "not a readable index of shards"),
        ("sharded safetensors", _garble, "model-00001-of-00003.safetensors", "its header is damaged"),
        ("sharded safetensors", _rename_tensor, "model-00001-of-00003.safetensors", "lacks 1 tensors that model.safe"),
        ("safetensors", _remove, "model.safetensors", "holds no weights; expected one of model.safetensors, "),
        ("safetensors", _remove, "config.json", "holds no config.json"),
    ],
)
def test_an_incomplete_directory_is_told_before_anything_is_read(
    layout: str, damage: Any, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llm(tmp_path / "llm", layout)
    damage(folder, name)

    def refuse(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("minigpt4.models.base_model.build_vision", refuse)
    with pytest.raises((CheckpointError, ConfigError), match=message) as raised:
        start(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("absent", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_would_be_drawn_at_random_are_an_error(absent: str, layout: str, tmp_path: Path) -> None:
    state = load_file(LLAMA / "model.safetensors")
    del state[absent]
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors of its language model, first: llama_model.{absent}"):
        start(write_llm(tmp_path / "llm", layout, state))


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    state = load_file(LLAMA / "model.safetensors")
    state["lm_head.weight"] = torch.zeros(700, 64)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[700, 64\], config.json says \[600, 64\]"):
        start(write_llm(tmp_path / "llm", "safetensors", state))


def test_tensors_nobody_knows_are_reported(tmp_path: Path) -> None:
    state = {**load_file(LLAMA / "model.safetensors"), "score.weight": torch.zeros(2, 64)}
    model = start(write_llm(tmp_path / "llm", "safetensors", state))
    assert model.load_reports[0].unexpected == ["llama_model.score.weight"]


def test_tied_embeddings_need_no_head_in_the_file(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    assert "lm_head.weight" not in load_file(tmp_path / "llm" / "model.safetensors")
    llm, report = build_llm(
        build_config(load_case(V2), llama_model=str(tmp_path / "llm"), lora_r=0), CPU, torch.float32
    )
    assert report is not None and not report.missing
    assert llm.lm_head.weight is llm.model.embed_tokens.weight


@pytest.mark.parametrize(("layout", "dtype"), [("sharded safetensors", torch.float32), ("sharded bin", torch.bfloat16)])
@pytest.mark.parametrize(("key", "stored"), [("low_resource", "int8"), ("load_in_4bit", "uint8")])
def test_quantised_models_answer_and_train_lora_on_a_cpu(
    key: str, stored: str, dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    case = load_case(V2)
    model = start(write_llm(tmp_path / "llm", layout), dtype, **{key: True}, lora_dropout=0.0)
    model.load_weights(case.tensors("weights"), "recorded", complete=True)
    sizes = frozen_bytes_by_dtype(model.llama_model)
    assert sizes[stored] == 122880 // (1 if stored == "int8" else 2)  # every matrix of the layers
    assert sum(sizes.values()) - sizes[stored] == 77248 * dtype.itemsize  # embeddings, head and norms as asked
    assert type(model._lm.lm_head) is nn.Linear and model._lm.lm_head.weight.dtype == dtype
    batch = padded(encode(model, case), images_of(case))
    output = model.train()(batch)
    output.loss_sum.backward()
    loss = float(output.loss_sum.detach()) / batch.num_target_tokens
    assert loss == pytest.approx(case.meta["loss_mean"], abs=0.02 if stored == "int8" else 0.5)
    full = build_model(case, lora_dropout=0.0)
    full(batch).loss_sum.backward()
    exact = dict(full.trainable_parameters_by_name())
    least = 0.95 if stored == "int8" else 0.5  # nf4 on drawn weights is coarse; directions by chance give 0.1
    for name, parameter in model.trainable_parameters_by_name():
        assert parameter.grad is not None and exact[name].grad is not None
        assert torch.cosine_similarity(parameter.grad.flatten(), exact[name].grad.flatten(), 0) > least, name
    prompt = model.encoder.encode_text(case.meta["generate"]["texts"][0])
    answers = model.generate([prompt], case.tensor("gen_images")[:1], GenerateOptions(max_new_tokens=4))
    if stored == "int8":
        exact_answers = full.generate([prompt], case.tensor("gen_images")[:1], GenerateOptions(max_new_tokens=4))
        assert answers == exact_answers


def test_int8_in_half_precision_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8 weights overflow in fp16 on a CPU; use precision fp32 or bf16"):
        start(LLAMA, torch.float16, low_resource=True)


@pytest.mark.parametrize("key", ["low_resource", "load_in_4bit"])
def test_a_quantised_checkpoint_round_trips(key: str) -> None:
    case = load_case(V2)
    first, second = start(LLAMA, **{key: True}), start(LLAMA, **{key: True})
    first.load_weights(case.tensors("weights"), "recorded", complete=True)
    second.load_weights(first.trainable_state(), "copy", complete=True)
    batch = padded(encode(first, case), images_of(case))
    with torch.no_grad():
        assert float(first(batch).loss_sum) == float(second(batch).loss_sum)
