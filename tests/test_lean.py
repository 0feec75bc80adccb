"""Lean layers compute what the libraries' layers compute, keep less for the backward, and step aside otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.live_memory import LiveMemory
from minigpt4.models.lean import use_lean_layers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any], list[str], bool]] = {
    "llama": (LlamaConfig, GROUPED, ["q_proj", "v_proj"], True),
    "mistral": (MistralConfig, GROUPED, ["q_proj", "down_proj"], True),
    "qwen2": (Qwen2Config, GROUPED, ["q_proj", "gate_proj"], True),
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 8}, ["o_proj"], True),
    "gemma2": (Gemma2Config, {**GROUPED, "head_dim": 8}, ["q_proj"], False),  # gated, but with GELU
    "phi3": (Phi3Config, GROUPED, ["qkv_proj"], False),  # one matrix for gate and up
    "gpt_neox": (GPTNeoXConfig, SIZES, ["query_key_value"], False),
}


def build(name: str, dropout: float = 0.0) -> Any:
    """A tiny random model with adapters, as the libraries build it, in train mode."""
    config_class, sizes, targets, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config_class(**sizes)).requires_grad_(False)
    llm = get_peft_model(llm, LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=targets))
    for key, parameter in llm.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.2)
    return llm.train()


def run(llm: Any) -> dict[str, Tensor]:
    """Logits, gradient of the input embeddings and of everything that trains."""
    llm.zero_grad()
    embeddings = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = llm(inputs_embeds=embeddings, use_cache=False).logits
    (logits.float() ** 2).mean().backward()
    assert embeddings.grad is not None
    grads = {name: p.grad for name, p in llm.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), "embeddings": embeddings.grad, **grads}


def num_lean(llm: nn.Module, kind: str) -> int:
    return sum(any(base.__name__ == kind for base in type(module).__mro__) for module in llm.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_computes_the_same_with_lean_layers(name: str) -> None:
    stock, lean = build(name), build(name)
    use_lean_layers(lean)
    assert num_lean(lean, "_LeanMLP") == (2 if ARCHITECTURES[name][3] else 0)
    expected, found = run(stock), run(lean)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a layer leaves alive for its backward besides its result."""
    with LiveMemory() as memory:
        result = layer(x)
        return memory.alive - result.untyped_storage().nbytes()


def test_a_lean_mlp_keeps_gate_and_up_alone() -> None:
    mlp = build("llama").get_base_model().model.layers[0].mlp
    x = torch.randn(1, 5, 32, requires_grad=True)
    one = 5 * 48 * 4
    assert kept_bytes(mlp, x) == 3 * one
    use_lean_layers(mlp)
    assert kept_bytes(mlp, x) == 2 * one
