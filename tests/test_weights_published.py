"""Published files load by their exact names, shapes and dtypes, and give the reference's numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.schema import ModelConfig
from minigpt4.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config
from minigpt4.models.vision import build_vision, load_tower
from minigpt4.models.weights import canonical_name, read_state, read_weights
from tests.golden_cases import GOLDEN, TINY_EVA, build_config, encode, images_of, load_case, padded
from tests.published_files import blip2_shapes, eva_shapes, llama_7b, published, save_sparse, split_case

V2, VICUNA = "c_minigptv2_lora_instruction", "a_minigpt4_qformer_vicuna"
CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_eva_file_fills_our_tower_and_the_rest_of_it_is_known(tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "eva_vit_g.pth", eva_shapes())
    cfg = ModelConfig(image_size=448)
    tower, _, _ = build_vision(cfg, META, torch.float16)
    report = load_tower(tower, read_weights(path), cfg, META, torch.float16)
    assert report.parts() == {"visual_encoder": {"loaded": 511, "ignored": 17}}
    assert {name: list(value.shape) for name, value in tower.state_dict().items()} == {
        name: [1, 1025, 1408] if name == "pos_embed" else shape
        for name, (shape, _) in published("eva_vit_g_224").items()
    }
    assert {value.dtype for value in tower.state_dict().values()} == {torch.float16}
    assert "trained at 224 px, model.image_size 448" in report.notes[0] and not report.warnings()


def test_the_blip2_file_fills_the_qformer_and_the_rest_of_it_is_known(tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "blip2_pretrained_flant5xxl.pth", blip2_shapes(), wrap="model")
    cfg = MiniGPT4Config(llama_model=str(llama_7b(tmp_path / "vicuna")))
    model = MiniGPT4.from_config(cfg, META, torch.float16)
    model._load_blip2(str(path))
    loaded = {part: row["loaded"] for part, row in model.load_reports[-1].parts().items() if "loaded" in row}
    assert loaded == {"Qformer": 254, "ln_vision": 2, "query_tokens": 1}
    assert not model.load_reports[-1].unexpected
    ours = {canonical_name(name) for name, _ in model.named_parameters() if name.startswith("qformer.")}
    assert ours == {f"Qformer.{name}" for name in published("qformer")} - {"Qformer.bert.embeddings.position_ids"}


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ("minigpt4_vicuna", {"llama_proj": 2}),
        ("minigpt4_llama2", {"llama_proj": 2}),
        ("minigpt_v2", {"LoRA": 128, "llama_proj": 2}),
        ("minigpt_v2_peft09", {"LoRA": 128, "llama_proj": 2}),
    ],
)
def test_a_published_checkpoint_fits_the_model_of_7b(tmp_path: Path, file: str, parts: dict[str, int]) -> None:
    path = save_sparse(tmp_path / "checkpoint.pth", published(file), wrap="model")
    llama = str(llama_7b(tmp_path / "llama"))
    model: MiniGPT4 | MiniGPTv2
    if file.startswith("minigpt4"):
        cfg = MiniGPT4Config(llama_model=llama, has_qformer=file == "minigpt4_vicuna")
        model = MiniGPT4.from_config(cfg, META, torch.float16)
    else:
        model = MiniGPTv2.from_config(MiniGPTv2Config(llama_model=llama), META, torch.float16)
    report = model.load_weights(read_state(path), "published")
    assert report.loaded == parts
    assert not report.missing and not report.unexpected
    assert len(report.ignored) == 32 + (file == "minigpt4_vicuna")


@pytest.mark.parametrize("spelling", ["", ".default"])
@pytest.mark.parametrize("name", [V2, VICUNA])
def test_a_model_read_from_files_gives_the_reference_s_loss(name: str, spelling: str, tmp_path: Path) -> None:
    case = load_case(name)
    cfg = build_config(case, **split_case(case, tmp_path, spelling))
    model = (MiniGPT4 if name == VICUNA else MiniGPTv2).from_config(cfg, CPU, torch.float32)
    sources = [Path(report.source).name for report in model.load_reports]
    if name == V2:  # no file of MiniGPT-v2 holds ln_vision; the recorded case has drawn numbers there
        ln_vision = {n: v for n, v in case.tensors("weights").items() if n.startswith("ln_vision.")}
        model.ln_vision.load_state_dict({n.removeprefix("ln_vision."): v for n, v in ln_vision.items()})
    batch = padded(encode(model, case), images_of(case))
    with torch.no_grad():
        loss = float(model(batch).loss_sum) / batch.num_target_tokens
    assert loss == pytest.approx(case.meta["loss_mean"], abs=1e-5)
    assert sources == ["tower.pth", "llama_base", *["blip2.pth"] * (name == VICUNA), "checkpoint_3.pth"]
    assert not any(report.warnings() for report in model.load_reports)


@pytest.mark.parametrize("side", [3, 8])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_tower_at_another_image_size_gives_the_reference_s_tokens(side: int, suffix: str, tmp_path: Path) -> None:
    state = load_file(GOLDEN / "pos_embed" / "eva_4x4_state.safetensors")
    path = tmp_path / f"tower{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    cfg = ModelConfig(image_size=14 * side, vit_model="eva", vit_config=TINY_EVA, vit_weights=str(path))
    tower, info, report = build_vision(cfg, CPU, torch.float32)
    assert info.num_patches == side * side and report is not None
    image = torch.from_numpy(np.load(GOLDEN / "pos_embed" / f"image_{side}x{side}.npy"))
    expected = torch.from_numpy(np.load(GOLDEN / "pos_embed" / f"vit_out_{side}x{side}.npy"))
    with torch.no_grad():
        torch.testing.assert_close(tower(image), expected, atol=1e-5, rtol=0)
    assert f"trained at 56 px, model.image_size {14 * side}" in report.warnings()[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_half_precision_tower_is_read_straight_into_its_final_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {n: v.half() for n, v in load_file(GOLDEN / "pos_embed" / "eva_4x4_state.safetensors").items()}
    torch.save(state, tmp_path / "tower.pth")
    cfg = ModelConfig(image_size=56, vit_model="eva", vit_config=TINY_EVA, vit_weights=str(tmp_path / "tower.pth"))
    tower, _, _ = build_vision(cfg, CPU, dtype)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, state[name].float().to(dtype)), name
    assert not any(block.attn.k_bias.any() or block.attn.k_bias.dtype != dtype for block in tower.blocks)


def test_a_trained_tower_keeps_its_gradients_and_the_file_its_content(tmp_path: Path) -> None:
    case = load_case(V2)
    files = split_case(case, tmp_path)
    cfg = build_config(case, **files, freeze_vit=False)
    model = MiniGPTv2.from_config(cfg, CPU, torch.float32)
    assert all(parameter.requires_grad for parameter in model.visual_encoder.parameters())
    before = read_state(Path(files["vit_weights"]))["cls_token"].clone()
    with torch.no_grad():
        model.visual_encoder.cls_token.add_(1.0)
    assert torch.equal(read_state(Path(files["vit_weights"]))["cls_token"], before)


@pytest.mark.parametrize("damage", ["missing", "shape", "table"])
def test_a_tower_file_that_does_not_fit_names_the_tensor(damage: str, tmp_path: Path) -> None:
    state = load_file(GOLDEN / "pos_embed" / "eva_4x4_state.safetensors")
    if damage == "missing":
        del state["blocks.1.attn.q_bias"]
    elif damage == "shape":
        state["blocks.1.attn.q_bias"] = torch.zeros(32)
    else:
        state["pos_embed"] = torch.zeros(1, 19, 64)
    torch.save(state, tmp_path / "tower.pth")
    cfg = ModelConfig(image_size=56, vit_model="eva", vit_config=TINY_EVA, vit_weights=str(tmp_path / "tower.pth"))
    message = {
        "missing": r"lacks 1 of the \d+ tensors of the vision tower, first: blocks\.1\.attn\.q_bias",
        "shape": r"blocks\.1\.attn\.q_bias is \[32\], the vision tower has \[64\]",
        "table": r"pos_embed is \[1, 19, 64\], the vision tower has \[1, 17, 64\]",
    }
    with pytest.raises(CheckpointError, match=message[damage]):
        build_vision(cfg, CPU, torch.float32)


def test_tensors_nobody_knows_are_left_out_with_a_warning(tmp_path: Path) -> None:
    state = load_file(GOLDEN / "pos_embed" / "eva_4x4_state.safetensors")
    torch.save({**state, "mystery.weight": torch.ones(2)}, tmp_path / "tower.pth")
    cfg = ModelConfig(image_size=56, vit_model="eva", vit_config=TINY_EVA, vit_weights=str(tmp_path / "tower.pth"))
    _, _, report = build_vision(cfg, CPU, torch.float32)
    assert (
        report is not None and "1 unknown tensors were left out, first: visual_encoder.mystery" in report.warnings()[0]
    )


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_blip2_file_that_does_not_fit_names_the_tensor(damage: str, tmp_path: Path) -> None:
    case = load_case(VICUNA)
    files = split_case(case, tmp_path)
    state = torch.load(files["q_former_model"])
    if damage == "missing":
        del state["model"]["ln_vision.bias"]
    else:
        state["model"]["query_tokens"] = torch.zeros(1, 32, 4)
    torch.save(state, files["q_former_model"])
    with pytest.raises(
        CheckpointError, match={"missing": r"first: ln_vision\.bias", "shape": "query_tokens is"}[damage]
    ):
        MiniGPT4.from_config(build_config(case, **files), CPU, torch.float32)


def test_all_missing_files_are_told_at_once_with_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    cfg = build_config(load_case(VICUNA), vit_model="eva_clip_g", vit_config={}, image_size=56, vit_weights="")
    cfg = dataclasses.replace(cfg, q_former_model="", ckpt="/nowhere/pretrained_minigpt4_7b.pth")
    with pytest.raises(ConfigError) as raised:
        MiniGPT4.from_config(cfg, CPU, torch.float32)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["model.vit_weights", "model.ckpt", "model.q_former_model"]
    assert f"looked in {tmp_path / 'eva_vit_g.pth'}, {tmp_path / 'weights' / 'eva_vit_g.pth'}" in lines[0]
    assert "It is the vision tower that BLIP-2 published" in lines[0]
    assert f"looked in /nowhere/pretrained_minigpt4_7b.pth, {tmp_path / 'weights'}" in lines[1]
    assert "docs/WEIGHTS.md says where to get it" in lines[2]


def test_a_tower_that_cannot_be_downloaded_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="the weights of 'vit_tiny_patch16_224' cannot be downloaded"):
        build_vision(ModelConfig(vit_model="vit_tiny_patch16_224"), CPU, torch.float32)


def test_another_timm_tower_is_resized_loaded_and_left_complete(tmp_path: Path) -> None:
    import timm

    source = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=1, embed_dim=48, num_heads=3)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    cfg = ModelConfig(
        vit_model="vit_tiny_patch16_224", vit_config={"depth": 1, "embed_dim": 48, "num_heads": 3}, image_size=96,
        vit_weights=str(tmp_path / "vit.safetensors"),
    )  # fmt: skip
    tower, info, report = build_vision(cfg, CPU, torch.float32)
    assert report is not None and report.ignored == ["visual_encoder.head.bias", "visual_encoder.head.weight"]
    assert "trained at 64 px, model.image_size 96" in report.warnings()[0]
    assert tower(torch.zeros(1, 3, 96, 96)).shape == (1, 1 + info.num_patches, 48)
    assert torch.equal(tower.vit.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_a_tower_that_an_earlier_stage_trained_goes_on_into_checkpoints(tmp_path: Path) -> None:
    case = load_case("c_minigptv2_lora_instruction")
    files = split_case(case, tmp_path)
    earlier = torch.load(files["ckpt"], weights_only=True)
    name = "visual_encoder.blocks.0.mlp.fc1.weight"
    trained = case.tensors("weights")[name] + 1.0
    torch.save({**earlier, "model": {**earlier["model"], name: trained}}, tmp_path / "stage_a.pth")
    cfg = build_config(case, **{**files, "ckpt": str(tmp_path / "stage_a.pth")})
    model = MiniGPTv2.from_config(cfg, torch.device("cpu"), torch.float32)
    kept = model.trainable_state()
    torch.testing.assert_close(kept[name], trained)
    assert [n for n in kept if n.startswith("visual_encoder.")] == [name]  # the rest has its file
    again = MiniGPTv2.from_config(dataclasses.replace(cfg, ckpt=""), torch.device("cpu"), torch.float32)  # as chat does
    again.load_weights(kept, "checkpoint", complete=True)
    torch.testing.assert_close(again.trainable_state()[name], trained)
