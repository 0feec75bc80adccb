"""Exports: what is refused, what is written, what is found out when a file is wrong."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from minigpt4.cli import main as minigpt4_main
from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.export import blip2, hf, projection, run
from minigpt4.export.output import check_destination
from minigpt4.export.run import TARGETS, Wishes, export
from minigpt4.export.source import Source, open_source
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.llm import causal_lm
from minigpt4.models.weights import canonical_name, read_state
from minigpt4.tools import export as command
from tests.export_parts import APPLICABLE, LLAMA2, V2, VICUNA, Exports, leftovers, perturbed, write_checkpoint
from tests.golden_cases import LLAMA, build_config, build_model, load_case


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture()
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("weights were loaded before the mistake was told")

    monkeypatch.setattr(Source, "load", load)


@pytest.mark.parametrize(("case", "target"), APPLICABLE)
def test_every_export_is_written_checked_and_described(exports: Exports, case: str, target: str) -> None:
    folder = exports.folder(case, target)
    marker = json.loads((folder / "export.json").read_text())
    assert marker["to"] == target and marker["check"].endswith("12 greedy ids are equal")
    card = (folder / "README.md").read_text()
    assert "# my_faces, step 3" in card and "| faces | 12 | 3 | 2 | `1f2e3d` |" in card and "| val_loss | 1.5 |" in card
    for needed in ("language model | llama_base", "## Intended use and limits", "## Licences", marker["check"]):
        assert needed in card
    assert leftovers(exports.root) == []


@pytest.mark.parametrize(("case", "target"), [pair for pair in APPLICABLE if pair[1] != "pth"])
def test_no_export_names_a_folder_of_this_machine(exports: Exports, case: str, target: str) -> None:
    for file in exports.folder(case, target).rglob("*"):
        if file.suffix in (".json", ".md", ".py"):
            text = file.read_text()
            assert str(LLAMA.parent) not in text and str(exports.root) not in text, file.name


@pytest.mark.parametrize(
    ("case", "target", "message"),
    [
        (VICUNA, "peft", "no LoRA .* use --to hf"),
        (LLAMA2, "peft", "no LoRA .* use --to hf"),
        (LLAMA2, "blip2", "minigpt4 without a Q-Former merges four patches .* use --to hf"),
        (V2, "blip2", "minigpt_v2 merges four patches .* use --to hf"),
    ],
)
def test_a_target_that_cannot_hold_the_model_says_why_and_what_can(
    exports: Exports, no_weights: None, tmp_path: Path, case: str, target: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(exports.source(case), TARGETS[target], Wishes(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


PLANTED: list[tuple[str, str, Any, str, str]] = [
    (V2, "peft", projection, "write_tensors", "llama_proj.weight"),
    (V2, "merged", projection, "write_tensors", "llama_proj.bias"),
    (V2, "hf", hf, "write_shards", "language_model.model.layers.1.self_attn.v_proj.weight"),
    (VICUNA, "hf", hf, "write_shards", "vision_tower.encoder.layers.0.self_attn.qkv.bias"),
    (VICUNA, "hf", hf, "write_shards", "query_tokens"),
    (LLAMA2, "hf", hf, "write_shards", "ln_vision.weight"),
    (VICUNA, "blip2", blip2, "write_shards", "vision_model.embeddings.position_embedding"),
    (VICUNA, "blip2", blip2, "write_shards", "language_projection.weight"),
]


@pytest.mark.parametrize(("case", "target", "module", "writer", "name"), PLANTED)
def test_one_wrong_tensor_fails_the_check_and_leaves_nothing(
    exports: Exports,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    target: str,
    module: Any,
    writer: str,
    name: str,
) -> None:
    write: Callable[[Path, Mapping[str, Tensor]], None] = getattr(module, writer)

    def wrong(path: Path, tensors: Mapping[str, Tensor]) -> None:
        write(path, perturbed(dict(tensors), name) if name in tensors else tensors)

    monkeypatch.setattr(module, writer, wrong)
    with pytest.raises(CheckpointError, match=f"--to {target}.*: logits differ by .* from the model's"):
        export(exports.source(case), TARGETS[target], Wishes(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", [V2, VICUNA])
def test_a_wrong_tensor_in_a_pth_is_found(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    save = torch.save

    def wrong(content: dict[str, Any], path: Path) -> None:
        save({**content, "model": perturbed(content["model"], "llama_proj.weight")}, path)

    monkeypatch.setattr(torch, "save", wrong)
    with pytest.raises(CheckpointError, match="--to pth: logits differ"):
        export(exports.source(case), TARGETS["pth"], Wishes(tmp_path / "out.pth"))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_missing_in_the_files_is_found(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = hf.write_shards
    lost = "projection.bias"
    monkeypatch.setattr(hf, "write_shards", lambda path, t: write(path, {k: v for k, v in t.items() if k != lost}))
    with pytest.raises(CheckpointError, match="1 missing keys on loading, first: projection.bias"):
        export(exports.source(V2), TARGETS["hf"], Wishes(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_out_is_refused_and_force_replaces_an_export_only(
    exports: Exports, no_weights: None, tmp_path: Path
) -> None:
    mine, earlier = tmp_path / "mine", tmp_path / "earlier"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    earlier.mkdir()
    (earlier / "export.json").touch()
    for out in (mine, earlier):
        with pytest.raises(ConfigError, match="exists; choose another name, or replace it with --force"):
            export(exports.source(V2), TARGETS["pth"], Wishes(out))
    with pytest.raises(ConfigError, match=r"holds other files and no export\.json"):
        export(exports.source(V2), TARGETS["pth"], Wishes(mine, force=True))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not an exported folder"):
        check_destination(tmp_path / "notes.txt", force=True)
    with pytest.raises(ConfigError, match=r"notes\.txt' is a file, not a directory"):
        check_destination(tmp_path / "notes.txt" / "out", force=False)
    check_destination(earlier, force=True)
    with pytest.raises(ConfigError, match="is the root of the file system"):
        check_destination(Path("/"), force=True)
    assert (mine / "thesis.tex").exists()


def test_the_model_has_left_the_memory_before_the_files_are_read(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = TARGETS["merged"], []
    load, reload = Source.load, type(target).reload

    def watched(self: Source, ckpt: str = "") -> Any:
        assistant = load(self, ckpt)
        seen.append(weakref.ref(assistant.model))
        return assistant

    def reloaded(self: Any, *given: Any) -> Any:
        assert [model() for model in seen] == [None]
        return reload(self, *given)

    monkeypatch.setattr(Source, "load", watched)
    monkeypatch.setattr(type(target), "reload", reloaded)
    export(exports.source(V2), target, Wishes(tmp_path / "out"))


def test_force_leaves_the_old_export_until_the_new_one_is_checked(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(exports.source(V2), TARGETS["peft"], Wishes(out))
    before = (out / "export.json").read_text()
    write = projection.write_tensors
    with monkeypatch.context() as patch:
        patch.setattr(projection, "write_tensors", lambda p, t: write(p, {k: v + 1 for k, v in t.items()}))
        with pytest.raises(CheckpointError):
            export(exports.source(V2), TARGETS["peft"], Wishes(out, force=True))
    assert (out / "export.json").read_text() == before
    export(exports.source(V2), TARGETS["pth"], Wishes(out, force=True))
    assert json.loads((out / "export.json").read_text())["to"] == "pth" and not (out / "adapter_config.json").exists()
    assert leftovers(tmp_path) == []


def test_a_pth_holds_the_published_names_and_loads_back_bit_by_bit(exports: Exports) -> None:
    folder = exports.folder(V2, "pth")
    content = torch.load(folder / "checkpoint_1.pth", weights_only=True)  # 6 iterations of 3 per epoch
    assert content.keys() == {"model", "optimizer", "config", "scaler", "epoch"}
    assert content["epoch"] == 1 and content["scaler"] is None and content["optimizer"] == {}
    assert content["config"]["model"]["arch"] == "minigpt_v2" and content["config"]["run"]["iters_per_epoch"] == 3
    # What trains, under the reference's own keys: peft 0.2.0 spells LoRA without an adapter name. The tower of this
    # model is random, so the file has to hold it as well.
    published = set(load_case(V2).tensors("grads"))
    stored = {name for name in content["model"] if not name.startswith(("visual_encoder.", "ln_vision."))}
    assert stored == published and any(name.endswith("q_proj.lora_A.weight") for name in stored)
    model = build_model(load_case(V2))
    with torch.no_grad():
        for _, parameter in model.trainable_parameters_by_name():
            parameter.zero_()
    model.load_weights(read_state(folder / "checkpoint_1.pth"), "pth", complete=True)
    trained = exports.model(V2).trainable_state()
    assert all(torch.equal(value, trained[name]) for name, value in model.trainable_state().items())


def test_a_peft_folder_loads_onto_the_base_and_gives_the_trained_logits(exports: Exports) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = exports.folder(V2, "peft")
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(LLAMA), str(folder)).eval()
    ids = torch.tensor([[1, 299, 463, 567, 366]])
    with torch.no_grad():
        ours = causal_lm(exports.model(V2).llama_model)(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, ours, atol=1e-5, rtol=0)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - ours).abs().max() > 1e-3
    written = load_file(folder / "projection.safetensors")
    trained = exports.model(V2).trainable_state()
    assert written.keys() == {"llama_proj.weight", "llama_proj.bias"}
    assert all(torch.equal(value, trained[name]) for name, value in written.items())
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "llama_base"


def test_a_vision_tower_that_no_other_file_holds_is_exported_too(exports: Exports) -> None:
    trained = exports.model(VICUNA).trainable_state()
    vision = load_file(exports.folder(VICUNA, "merged") / "vision.safetensors")
    assert {name for name in trained if not name.startswith("llama_proj.")} == set(vision)
    assert all(torch.equal(value, trained[name]) for name, value in vision.items())


def test_a_wrong_vision_tensor_beside_a_language_model_is_found(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, name = projection.write_tensors, "visual_encoder.pos_embed"
    monkeypatch.setattr(
        projection, "write_tensors", lambda p, t: write(p, perturbed(dict(t), name) if name in t else t)
    )
    with pytest.raises(CheckpointError, match=r"vision\.safetensors: visual_encoder\.pos_embed does not come back"):
        export(exports.source(V2), TARGETS["merged"], Wishes(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_merged_folder_is_the_language_model_with_lora_in_its_matrices(exports: Exports) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exports.folder(V2, "merged")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache and model.generation_config.eos_token_id == 2
    ids = torch.tensor([[1, 299, 463, 567, 366]])
    with torch.no_grad():
        ours = causal_lm(exports.model(V2).llama_model)(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, ours, atol=1e-5, rtol=0)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), exports.model(V2).encoder
    for text in ("[INST] hello", " leading", "</s>after", "caf\u00e9 \U0001f600"):
        assert tokenizer.encode(text, add_special_tokens=False) == encoder.tokenizer.encode(text)


def test_a_merged_folder_is_a_language_model_of_this_repository(exports: Exports) -> None:
    folder = exports.folder(V2, "merged")
    model = build_model_on(folder)
    assert isinstance(model, GenerationMixin)
    encoder = exports.model(V2).encoder
    assert model.encoder.tokenizer.encode(" <s>[INST] a") == encoder.tokenizer.encode(" <s>[INST] a")


def build_model_on(folder: Path) -> object:
    from minigpt4.models.minigpt_v2 import MiniGPTv2

    cfg = build_config(load_case(V2), llama_model=str(folder), lora_r=0)
    return MiniGPTv2.from_config(cfg, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]


def test_published_weights_are_exported_through_their_yaml(exports: Exports, tmp_path: Path) -> None:
    weights = exports.folder(V2, "pth") / "checkpoint_1.pth"
    config = tmp_path / "model.yaml"
    written = yaml.safe_load((exports.checkpoint(V2) / "config.yaml").read_text())
    config.write_text(
        yaml.safe_dump({"model": written["model"], "datasets": {}, "run": {"task": "image_text_pretrain"}})
    )
    export(open_source(str(weights), str(config)), TARGETS["merged"], Wishes(tmp_path / "out"))
    config.write_text(config.read_text().replace("ckpt: ''", f"ckpt: {weights}"))
    source = open_source(None, str(config))
    assert source.title == "checkpoint_1" and source.question_processor == "identity"
    export(source, TARGETS["merged"], Wishes(tmp_path / "again"))
    first = load_file(exports.folder(V2, "merged") / "model.safetensors")
    for folder in ("out", "again"):
        other = load_file(tmp_path / folder / "model.safetensors")
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    assert "Published weights" in (tmp_path / "out" / "README.md").read_text()


def test_half_precision_is_written_checked_and_reported(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(exports.source(V2), TARGETS["merged"], Wishes(tmp_path / "out", dtype="bfloat16"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "Storing the weights in bfloat16 changes logits by up to" in (tmp_path / "out" / "README.md").read_text()
    assert "rounding" in capsys.readouterr().out


def test_weights_that_overflow_half_precision_are_refused(exports: Exports, tmp_path: Path) -> None:
    model = exports.model(V2)
    weights = model.trainable_state()
    weights["llama_proj.bias"][0] = 1e6
    checkpoint = write_checkpoint(tmp_path / "job", model.cfg, weights)
    with pytest.raises(CheckpointError, match="do not fit into float16: .* use --dtype float32"):
        export(open_source(str(checkpoint), None), TARGETS["merged"], Wishes(tmp_path / "out", dtype="float16"))
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


def test_a_model_that_was_used_quantised_is_exported_with_full_weights(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = exports.model(V2)
    checkpoint = write_checkpoint(tmp_path / "job", replace(model.cfg, load_in_4bit=True), model.trainable_state())
    export(open_source(str(checkpoint), None), TARGETS["pth"], Wishes(tmp_path / "m.pth"))
    assert "answers with full weights may differ" in capsys.readouterr().out


def test_an_adapter_for_a_random_language_model_is_refused(exports: Exports, tmp_path: Path) -> None:
    cfg = build_config(load_case(V2), llama_weights="random")
    checkpoint = write_checkpoint(tmp_path / "job", cfg, {"llama_proj.bias": torch.zeros(64)})
    with pytest.raises(ConfigError, match="the language model is random"):
        export(open_source(str(checkpoint), None), TARGETS["peft"], Wishes(tmp_path / "out"))


def test_a_pth_file_may_be_named_and_stands_alone(exports: Exports, tmp_path: Path) -> None:
    arguments = ["--image", str(picture(tmp_path)), "--question", "Who is this?", "--seed", "3"]
    code = minigpt4_main(
        ["export", str(exports.checkpoint(LLAMA2)), "--to", "pth", "--out", str(tmp_path / "m.pth"), *arguments]
    )
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"m.pth", "face.png"}
    assert {canonical_name(name) for name in read_state(tmp_path / "m.pth")} >= {"llama_proj.weight", "llama_proj.bias"}


def picture(folder: Path) -> Path:
    path = folder / "face.png"
    Image.linear_gradient("L").save(path)
    return path


def test_the_command_and_the_targets_agree() -> None:
    assert list(command.TARGETS) == list(run.TARGETS)
    text = command.build_parser().format_help()
    assert "examples:" in text and all(name in text for name in command.TARGETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a checkpoint directory, or a YAML file of the model with --cfg-path"),
        (["nowhere"], "checkpoint 'nowhere': no such directory"),
        (["{checkpoint}", "--image", "nowhere.png"], "image 'nowhere.png': no such file"),
        (
            ["{checkpoint}/model.safetensors"],
            "is a file without a configuration; name the model's YAML with --cfg-path",
        ),
        (["{checkpoint}", "--out", "{checkpoint}"], "exists; choose another name"),
        (["{checkpoint}", "--question", "who is <ImageHere>?"], "--question must not hold <ImageHere>"),
        (["{checkpoint}", "--question-processor", "blip"], "unknown processor 'blip'"),
    ],
)
def test_a_users_mistake_is_told_before_weights_load(
    exports: Exports,
    no_weights: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    filled = [item.format(checkpoint=exports.checkpoint(V2)) for item in arguments]
    assert minigpt4_main(["export", "--to", "hf", "--out", str(tmp_path / "out"), *filled]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_yaml_without_weights_is_nothing_to_export(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(f"model: {{arch: minigpt_v2, llama_model: {LLAMA}}}\ndatasets: {{}}\nrun: {{}}\n")
    with pytest.raises(ConfigError, match=r"model\.ckpt is empty, there are no trained weights to export"):
        open_source(None, str(tmp_path / "m.yaml"))
