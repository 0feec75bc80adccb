"""Configurations of mid-size models for the planner's tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minigpt4 import catalog
from minigpt4.common.schema import Config, DatasetConfig, ModelConfig, RunConfig
from minigpt4.models.minigpt4 import MiniGPT4Config
from minigpt4.models.minigpt_v2 import MiniGPTv2Config
from tests.golden_cases import LLAMA

catalog.load()
EVA = {"patch_size": 14, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 4.0}
LANGUAGE_MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4000, "hidden_size": 192,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 512,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with config.json and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("language_model")
    (folder / "config.json").write_text(json.dumps(LANGUAGE_MODEL), encoding="utf-8")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(LLAMA / name, folder / name)
    return folder


def model_config(language_model: Path, arch: str, **changes: Any) -> ModelConfig:
    """MiniGPT-v2 with LoRA, or MiniGPT-4 with a Q-Former."""
    common: dict[str, Any] = {
        "image_size": 112, "vit_model": "eva", "vit_weights": "random", "vit_config": EVA,
        "llama_model": str(language_model), "llama_weights": "random",
    }  # fmt: skip
    if arch == "minigpt_v2":
        return MiniGPTv2Config(**{**common, "lora_r": 8, "end_sym": "</s>", **changes})
    qformer = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return MiniGPT4Config(**{**common, "q_former_model": "random", "qformer_config": qformer, **changes})


def run_config(model: ModelConfig, datasets: dict[str, dict[str, Any]] | None = None, **run: Any) -> Config:
    """A whole configuration, on the CPU unless ``run`` says otherwise."""
    blocks = datasets or {"faces": {}}
    sets = {name: DatasetConfig(name=name, **{"batch_size": 2, **block}) for name, block in blocks.items()}
    return Config(model, sets, RunConfig(**{"device": "cpu", **run}))
