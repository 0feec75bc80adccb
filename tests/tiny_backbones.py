"""Tiny language models and vision towers of well-known families: random weights, real configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_TEXT = (
    "What is this? What colour is it? Sure? A small cat. It is grey. system user assistant model",
    "What is in the picture? A red chair and a lamp. You are a helpful assistant. Who? Why?",
)

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family of language models: its config over ``_SIZES``, its special tokens and its chat template."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    eos: str = "</s>"
    bos: str | None = "<s>"
    writes_bos: bool = True
    marks: tuple[str, ...] = ()
    template: str = ""
    generation_ends: tuple[str, ...] = ()
    lora: tuple[str, ...] = ("q_proj", "v_proj")


_SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip

FAMILIES = {
    "llama3": Family(
        "llama", {"tie_word_embeddings": True}, "<|eot_id|>", "<|begin_of_text|>",
        marks=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"), template=LLAMA3,
        generation_ends=("<|end_of_text|>", "<|eot_id|>"),
    ),
    "qwen2": Family(
        "qwen2", {"tie_word_embeddings": True}, "<|endoftext|>", None, marks=("<|im_start|>", "<|im_end|>"),
        template=CHATML, generation_ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3": Family(
        "qwen3", {"head_dim": 16}, "<|im_end|>", None, marks=("<|im_start|>", "<|endoftext|>"), template=CHATML
    ),
    "mistral": Family("mistral", {"sliding_window": 5}, template=MISTRAL),
    "phi3": Family(
        "phi3", {"sliding_window": None}, "<|endoftext|>", "<s>", writes_bos=False,
        marks=("<|end|>", "<|user|>", "<|assistant|>"), template=PHI3, lora=("qkv_proj",),
    ),
    "gemma": Family(
        "gemma", {"head_dim": 8}, "<eos>", "<bos>", marks=("<start_of_turn>", "<end_of_turn>"), template=GEMMA
    ),
    "gemma2": Family(
        "gemma2",
        {"head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 2.0,
         "query_pre_attn_scalar": 8},
        "<eos>", "<bos>", marks=("<start_of_turn>", "<end_of_turn>"), template=GEMMA,
    ),
    "smollm3": Family(
        "smollm3", {}, "<|im_end|>", "<|im_start|>", writes_bos=False, marks=("<|endoftext|>",), template=CHATML
    ),
    "granite": Family(
        "granite", {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5,
                    "attention_multiplier": 0.2},
    ),
    "cohere": Family("cohere", {"logit_scale": 0.25}),
    "phi": Family("phi", {}, "<|endoftext|>", "<|endoftext|>", writes_bos=False),
    "gpt_neox": Family("gpt_neox", {}, "<|endoftext|>", None, lora=("query_key_value",)),
}  # fmt: skip


@cache
def _vocabulary(marks: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


def write_tokenizer(folder: Path, family: Family, **changes: Any) -> None:
    """A byte-level BPE tokenizer with the family's special tokens and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = tuple(dict.fromkeys(t for t in ("<pad>", family.bos, family.eos, *family.marks) if t))
    tokenizer = Tokenizer.from_str(_vocabulary(marks))
    if family.bos and family.writes_bos:
        number = tokenizer.token_to_id(family.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, number)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos,
        **({"bos_token": family.bos} if family.bos else {}),
        **({"chat_template": family.template} if family.template else {}),
        **changes,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if family.generation_ends:
        ends = [tokenizer.token_to_id(text) for text in family.generation_ends]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")


def write_llm(folder: Path, family: Family, **changes: Any) -> Path:
    """A directory in Hugging Face format with random weights large enough to disagree about words."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tokenizer(folder, family)
    config = AutoConfig.for_model(
        family.model_type,
        **{**_SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **family.config, **changes},
    )
    ends = folder / "generation_config.json"
    kept = ends.read_text(encoding="utf-8") if ends.is_file() else None
    generator = torch.Generator().manual_seed(0)
    llm: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in llm.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.1)
    llm.save_pretrained(folder)
    if kept is not None:  # saving writes settings of its own
        ends.write_text(kept, encoding="utf-8")
    return folder


TOWERS: dict[str, tuple[str, int, int, tuple[float, float, float]]] = {
    # name: timm name, image size, prefix tokens, mean of the images it was trained on
    "siglip": ("vit_base_patch16_siglip_224", 64, 0, (0.5, 0.5, 0.5)),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", 56, 5, (0.485, 0.456, 0.406)),
    "clip": ("vit_base_patch16_clip_224", 64, 1, (0.48145466, 0.4578275, 0.40821073)),
    "eva02": ("eva02_tiny_patch14_224", 56, 1, (0.48145466, 0.4578275, 0.40821073)),
    "eva02_clip": ("eva02_base_patch16_clip_224", 64, 1, (0.48145466, 0.4578275, 0.40821073)),
}
TINY_TOWER = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def tower_keys(name: str) -> dict[str, Any]:
    """``model:`` keys of a tiny tower."""
    timm_name, size, _, _ = TOWERS[name]
    return {"vit_model": timm_name, "image_size": size, "vit_weights": "random", "vit_config": dict(TINY_TOWER)}
