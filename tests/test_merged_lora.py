"""Answers without separate adapters: LoRA folded into the weights of the language model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.models.llm import merge_lora
from tests.golden_cases import build_model, load_case

V2 = "c_minigptv2_lora_instruction"
SHORT = GenerateOptions(max_new_tokens=12)


def trained(**changes: Any) -> GenerationMixin:
    """The tiny MiniGPT-v2 with adapters that matter."""
    model = build_model(load_case(V2), **changes)
    assert isinstance(model, GenerationMixin)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logits_of(model: GenerationMixin) -> torch.Tensor:
    prompt = [model.encoder.encode_text(load_case(V2).meta["generate"]["texts"][0])]
    with torch.no_grad(), model.autocast():
        embeddings, mask = model._left_padded(prompt, load_case(V2).tensor("gen_images")[:1])
        logits: torch.Tensor = model._lm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    return logits.float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_folded_adapters_give_the_same_greedy_ids_and_no_adapter_runs(caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    prompts = [model.encoder.encode_text(text) for text in load_case(V2).meta["generate"]["texts"]]
    images = load_case(V2).tensor("gen_images")
    expected, logits = model.generate(prompts, images, SHORT), logits_of(model)
    with model.llama_model.disable_adapter():
        assert model.generate(prompts, images, SHORT) != expected
    with caplog.at_level(logging.INFO):
        model.merge_lora()
    assert "folded into the weights" in caplog.text
    assert not any(isinstance(module, LoraLayer) or "lora" in name for name, module in model.named_modules())
    assert distance(logits_of(model), logits) < 1e-5
    assert model.generate(prompts, images, SHORT) == expected


def test_in_bfloat16_folding_adds_no_more_error_than_the_dtype_has() -> None:
    model = trained()
    exact = logits_of(model)
    model.dtype = torch.bfloat16
    for name, parameter in model.llama_model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    beside = distance(logits_of(model), exact)
    model.merge_lora()
    assert 0 < distance(logits_of(model), exact) < 1.5 * beside


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda llm: llm, "adapts the head"),
        (lambda llm: quantised(llm), "weights of Quantised cannot take them up"),
        (lambda llm: llm.unload(), "no adapters"),
    ],
    ids=["tied head", "quantised", "none"],
)
def test_what_cannot_be_folded_stays_and_says_why(change: Any, reason: str) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    llm = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **sizes, **heads))
    adapted = change(get_peft_model(llm, LoraConfig(r=2, target_modules=["lm_head"])))
    same, found = merge_lora(adapted)
    assert same is adapted and reason in found


class Quantised(nn.Linear):
    """Stands for a layer of bitsandbytes."""


def quantised(llm: Any) -> Any:
    for module in llm.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().__class__ = Quantised
    return llm


def test_a_model_in_training_keeps_its_adapters_when_it_answers() -> None:
    model = trained()
    model.train()
    model.generate([model.encoder.encode_text("who?")], torch.zeros(0, 3, 1, 1), replace(SHORT, max_new_tokens=2))
    assert any(isinstance(module, LoraLayer) for module in model.modules())
