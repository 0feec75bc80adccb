"""Lean layers compute what the libraries' layers compute, keep less for the backward, and step aside otherwise."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
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

from minigpt4.models.lean import use_lean_layers
from minigpt4.tools.live_memory import LiveMemory

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
    assert num_lean(lean, "LeanMLP") == (2 if ARCHITECTURES[name][3] else 0)
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


def lora_layer(dropout: float) -> Any:
    return build("llama", dropout).get_base_model().model.layers[0].self_attn.q_proj


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, (0, 0)), (0.5, (2, 0.25))])
def test_a_lean_adapter_keeps_no_dropped_copy_of_its_input(dropout: float, expected: tuple[float, float]) -> None:
    layer = lora_layer(dropout)
    x = torch.randn(1, 500, 32, requires_grad=True)
    unit = 500 * 32 * 4  # the input itself, older than the count
    low = 500 * 3 * 4
    stock = (kept_bytes(layer, x) - low) / unit
    use_lean_layers(layer)
    assert (stock, (kept_bytes(layer, x) - low) / unit) == expected


def test_dropout_of_a_lean_adapter_is_the_same_in_forward_and_backward() -> None:
    layer = lora_layer(0.5)
    use_lean_layers(layer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        a.copy_(torch.cat([torch.eye(3), torch.zeros(3, 29)], dim=1))  # reads the first three inputs
        b.copy_(torch.eye(3, 32).t())  # and writes them to the first three outputs, times alpha / r = 2
    x = torch.ones(1, 400, 32, requires_grad=True)
    result = layer(x)[..., :3]  # 0 where dropped, else 1 / (1 - 0.5) * 2
    assert set(result.unique().tolist()) == {0.0, 4.0}
    assert 0.4 < (result == 0).float().mean() < 0.6
    result.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[..., :3], result)  # the derivative of a linear map at one is its value
    torch.testing.assert_close(a.grad[:, :3], result.sum((0, 1)).expand(3, 3))  # sums of twice the dropped input
    layer.eval()
    torch.testing.assert_close(layer(x)[..., :3], torch.full((1, 400, 3), 2.0))


def test_lean_adapters_switch_off_merge_and_save_as_the_library_s_do() -> None:
    stock, lean = build("llama").eval(), build("llama").eval()
    use_lean_layers(lean)
    assert get_peft_model_state_dict(lean).keys() == get_peft_model_state_dict(stock).keys()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        adapted = lean(ids).logits
        with lean.disable_adapter(), stock.disable_adapter():
            assert torch.equal(lean(ids).logits, stock(ids).logits)
            assert not torch.allclose(lean(ids).logits, adapted)
        merged = lean.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-5, rtol=0)
    assert num_lean(merged, "_LeanLora") == 0


def test_two_active_adapters_run_the_library_s_forward() -> None:
    stock, lean = build("llama"), build("llama")
    for llm in (stock, lean):
        torch.manual_seed(2)
        llm.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        llm.base_model.set_adapter(["default", "second"])
    use_lean_layers(lean)
    expected, found = run(stock), run(lean)
    assert any("second" in key for key in found)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5)


def test_lean_layers_on_a_bfloat16_base_keep_float32_gradients() -> None:
    results = []
    for is_lean in (False, True):
        llm = build("llama")
        for parameter in llm.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        if is_lean:
            use_lean_layers(llm)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(llm))
    for key, value in results[0].items():
        assert results[1][key].dtype == value.dtype, key
        assert (results[1][key] - value).norm() / value.norm() < 0.03, key


def test_lean_adapters_on_four_bit_weights_compute_the_same() -> None:
    results = []
    for is_lean in (False, True):
        linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        torch.manual_seed(0)
        linear.weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
        holder = nn.ModuleDict({"q_proj": linear.to("cpu")})
        holder.is_loaded_in_4bit = True
        model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), holder)
        if is_lean:
            use_lean_layers(model)
        assert num_lean(model, "_LeanLora") == int(is_lean)
        layer = model["q_proj"]
        with torch.no_grad():
            for seed, weight in enumerate((layer.lora_A["default"].weight, layer.lora_B["default"].weight)):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        result = layer(x)
        (result**2).sum().backward()
        results.append([result.detach(), x.grad, layer.lora_A["default"].weight.grad])
    for stock, lean in zip(*results, strict=True):
        torch.testing.assert_close(lean, stock, atol=1e-3, rtol=1e-4)
