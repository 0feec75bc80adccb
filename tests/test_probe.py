"""A few words run through a language model tell whether, and how, it can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.common.errors import ConfigError
from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config
from minigpt4.models.probe import examine
from minigpt4.runners.parts import choose_packing
from tests.golden_cases import build_model, encode, images_of, load_case, packed
from tests.tiny_backbones import FAMILIES, tower_keys, write_llm


def tiny_lm(model_type: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    llm: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **changes}))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_(std=0.3)
    return llm


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bert", {}, "is not causal"),
        (
            "gemma3n_text",
            {
                "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 4, "head_dim": 8,
                "num_key_value_heads": 2, "num_kv_shared_layers": 0, "intermediate_size": [48, 48],
                "layer_types": ["full_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
            },
            "reads token ids besides embeddings",
        ),
        ("hyperclovax", {"logits_scaling": 4.0, "num_key_value_heads": 2}, "computes its logits in a way"),
    ],
)  # fmt: skip
def test_a_model_that_would_train_on_another_loss_is_refused(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"'llm' \(model_type {model_type}\) {reason}"):
        examine(tiny_lm(model_type, **changes), "llm")


def test_a_vision_language_model_is_refused() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    with torch.device("meta"):
        llm = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    with pytest.raises(ConfigError, match="is a model of several parts"):
        examine(llm, "llm")


def test_a_model_whose_attention_hears_of_no_lengths_keeps_transformers_masks() -> None:
    llm = tiny_lm("stablelm", num_key_value_heads=4)
    traits = examine(llm, "llm")
    assert traits.keeps_samples_apart and not traits.attends_by_sample
    assert llm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["falcon", "bloom"])
def test_samples_that_would_see_each_other_are_never_packed(model_type: str) -> None:
    traits = examine(tiny_lm(model_type), "llm")
    assert not traits.keeps_samples_apart and not traits.attends_by_sample
    case = load_case("c_minigptv2_lora_instruction")
    model = build_model(case)
    model.keeps_samples_apart, model.attends_by_sample = traits.keeps_samples_apart, traits.attends_by_sample
    assert choose_packing("auto", model) == "padded"
    with pytest.raises(ConfigError, match=r"run\.packing packed: samples in one row"):
        choose_packing("packed", model)
    with pytest.raises(ValueError, match="would see each other"):
        model(packed(encode(model, case), images_of(case)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma2", "granite", "mistral"])
def test_half_precision_does_not_confuse_the_look_at_a_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(write_llm(tmp_path, FAMILIES[name]), dtype=dtype)
    assert examine(llm, "llm").keeps_samples_apart


@pytest.mark.parametrize("kind", ["low_resource", "load_in_4bit"])
def test_quantised_weights_do_not_confuse_it_either(kind: str, tmp_path: Path) -> None:
    folder = write_llm(tmp_path, FAMILIES["granite"], hidden_size=64, intermediate_size=128)
    cfg = MiniGPTv2Config(llama_model=str(folder), lora_r=2, **{kind: True}, **tower_keys("siglip"))
    model = MiniGPTv2.from_config(cfg, torch.device("cpu"), torch.float32)
    assert model.attends_by_sample and model.logit_shape.scale == 0.25
