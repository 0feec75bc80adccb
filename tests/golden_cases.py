"""The reference's numbers on tiny random weights, and the models they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minigpt4.common.schema import ModelConfig
from minigpt4.common.types import IMAGE_TAG, Batch, Encoded, Turn
from minigpt4.models.base_model import BaseModel
from minigpt4.models.minigpt4 import MiniGPT4, MiniGPT4Config
from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config

GOLDEN = Path(__file__).parent / "golden"
LLAMA = GOLDEN / "llama_base"
CASES = sorted(path.stem for path in (GOLDEN / "models").glob("*.json"))
TINY_EVA = {"patch_size": 14, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 4.3637}


@cache
def _pool() -> dict[str, Tensor]:
    return load_file(GOLDEN / "models" / "tensors.safetensors")


@dataclass(frozen=True)
class Case:
    """One recorded run: configuration, samples, weights and what came out."""

    name: str
    meta: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        return _pool()[self.meta["tensors"][name]]

    def has(self, name: str) -> bool:
        return name in self.meta["tensors"]

    def tensors(self, group: str) -> dict[str, Tensor]:
        return {name: _pool()[key] for name, key in self.meta[group].items()}

    def turns(self) -> list[list[Turn]]:
        samples = self.meta["samples"]
        if "conv_q" in samples:
            pairs = zip(samples["conv_q"], samples["conv_a"], strict=True)
            return [
                [Turn(q, a) for q, a in zip(qs.split("!@#"), answers.split("!@#"), strict=True)]
                for qs, answers in pairs
            ]
        answers = samples["answer"]
        prompts = samples.get("instruction_input", [self.meta.get("chosen_prompt", IMAGE_TAG)] * len(answers))
        return [[Turn(prompt, answer)] for prompt, answer in zip(prompts, answers, strict=True)]


@cache
def load_case(name: str) -> Case:
    return Case(name, json.loads((GOLDEN / "models" / f"{name}.json").read_text()))


def build_config(case: Case, **changes: Any) -> ModelConfig:
    """The configuration of a case's tiny model."""
    runtime, published = case.meta["runtime"], case.meta["model"]["cfg"]
    common: dict[str, Any] = {
        "image_size": published["image_size"],
        "vit_model": "eva",
        "vit_weights": "random",
        "vit_config": TINY_EVA,
        "llama_model": str(LLAMA),
        "max_txt_len": runtime["max_txt_len"],
        "max_context_len": runtime["max_context_len"],
        "end_sym": runtime["end_sym"],
        "prompt_template": runtime["prompt_template"],
        "chat_template": bool(runtime["chat_template"]),
        **changes,
    }
    if case.meta["model"]["arch"] == "minigpt4":
        sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
        qformer = case.meta["model"]["qformer"] or {}
        return MiniGPT4Config(
            has_qformer=published["has_qformer"],
            num_query_token=published.get("num_query_token", 32),
            q_former_model=common.pop("q_former_model", "random"),
            qformer_config={key: qformer[key] for key in sizes if key in qformer},
            **common,
        )
    lora = {"lora_r": published["lora_r"], "lora_alpha": published["lora_alpha"], "lora_dropout": 0.05}
    return MiniGPTv2Config(**{**lora, **common})


def build_model(case: Case, **changes: Any) -> BaseModel:
    """The tiny model of a case with the recorded weights, in eval mode."""
    torch.set_num_threads(1)
    cfg = build_config(case, **changes)
    model_class = MiniGPT4 if isinstance(cfg, MiniGPT4Config) else MiniGPTv2
    model: BaseModel = model_class.from_config(cfg, torch.device("cpu"), torch.float32)
    model.load_weights(case.tensors("weights"), case.name, complete=True)
    return model


def encode(model: BaseModel, case: Case) -> list[Encoded]:
    return [model.encoder.encode_turns(turns) for turns in case.turns()]


def images_of(case: Case) -> Tensor:
    return case.tensor("image") if case.has("image") else torch.zeros(0, 3, 1, 1)


def padded(samples: list[Encoded], images: Tensor) -> Batch:
    longest = max(len(sample.ids) for sample in samples)

    def row(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return Batch(
        input_ids=torch.tensor([row(s.ids, 0) for s in samples]),
        position_ids=torch.tensor([row(list(range(len(s.ids))), 0) for s in samples]),
        labels=torch.tensor([row(s.labels, -100) for s in samples]),
        images=images,
        lengths=tuple(len(s.ids) for s in samples),
        num_target_tokens=sum(label != -100 for s in samples for label in s.labels),
    )


def packed(samples: list[Encoded], images: Tensor) -> Batch:
    return Batch(
        input_ids=torch.tensor([[i for s in samples for i in s.ids]]),
        position_ids=torch.tensor([[i for s in samples for i in range(len(s.ids))]]),
        labels=torch.tensor([[label for s in samples for label in s.labels]]),
        images=images,
        lengths=tuple(len(s.ids) for s in samples),
        num_target_tokens=sum(label != -100 for s in samples for label in s.labels),
    )
