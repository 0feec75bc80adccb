"""Files as they are published, by name, nesting and dtype: sparse ones in full size, or tiny ones with values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden_cases import GOLDEN, LLAMA, Case

Shapes = Mapping[str, tuple[list[int], str]]


def published(name: str) -> dict[str, tuple[list[int], str]]:
    """Tensor name -> (shape, dtype) as recorded from the reference's own models."""
    content = json.loads((GOLDEN / "state_dict_keys" / f"{name}.json").read_text())
    return {key: (shape, dtype) for key, (shape, dtype) in content.items()}


def save_sparse(path: Path, shapes: Shapes, wrap: str = "") -> Path:
    """A file of ``torch.save`` in full size whose bytes are holes: gigabytes that take no room and no time."""
    state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()}
    with torch.serialization.skip_data():
        torch.save({wrap: state} if wrap else state, path)
    return path


def eva_shapes() -> dict[str, tuple[list[int], str]]:
    """The whole EVA file: half precision, a fortieth block, the final norm and the head."""
    shapes = {name: (shape, "float16") for name, (shape, _) in published("eva_vit_g_224").items()}
    last = {name: value for name, value in shapes.items() if name.startswith("blocks.38.")}
    shapes |= {name.replace("blocks.38.", "blocks.39."): value for name, value in last.items()}
    ends = {"norm.weight": [1408], "norm.bias": [1408], "head.weight": [1024, 1408], "head.bias": [1024]}
    return {**shapes, **{name: (shape, "float16") for name, shape in ends.items()}}


def blip2_shapes() -> dict[str, tuple[list[int], str]]:
    """A whole BLIP-2 file: what the Q-Former uses, and everything that it does not."""
    shapes = {f"Qformer.{name}": value for name, value in published("qformer").items()}
    query = {name: value for name, value in shapes.items() if "_query." in name}
    shapes |= {name.replace("_query.", "."): value for name, value in query.items()}  # text branch
    rest = {
        "query_tokens": [1, 32, 768],
        "ln_vision.weight": [1408],
        "ln_vision.bias": [1408],
        "Qformer.bert.embeddings.word_embeddings.weight": [30523, 768],
        "Qformer.bert.embeddings.position_embeddings.weight": [512, 768],
        "Qformer.cls.predictions.bias": [30523],
        "Qformer.cls.predictions.transform.dense.weight": [768, 768],
        "t5_proj.weight": [4096, 768],
        "opt_proj.bias": [2560],
        "visual_encoder.cls_token": [1, 1, 1408],
        "vision_proj.weight": [256, 768],
        "itm_head.bias": [2],
        "temp": [],
    }
    return {**shapes, **{name: (shape, "float32") for name, shape in rest.items()}}


def llama_7b(folder: Path) -> Path:
    """config.json and tokenizer of a Llama-2-7B directory, without weights."""
    shutil.copytree(LLAMA, folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, "vocab_size": 32000}))
    return folder


def split_case(case: Case, folder: Path, spelling: str = "") -> dict[str, str]:
    """The recorded weights of a case as the files a user downloads; returns the keys of ``model`` that name them.

    spelling: ``.default`` for the LoRA names of newer peft versions.
    """
    state = case.tensors("weights")
    tower = {n.removeprefix("visual_encoder."): v for n, v in state.items() if n.startswith("visual_encoder.")}
    tower["blocks.3.norm1.weight"] = torch.ones(64)
    tower["head.weight"] = torch.ones(8, 64)
    torch.save(tower, folder / "tower.pth")
    blip2 = {n: v for n, v in state.items() if n.startswith(("Qformer.", "query_tokens", "ln_vision."))}
    blip2["Qformer.cls.predictions.bias"] = torch.ones(8)
    torch.save({"model": blip2}, folder / "blip2.pth")
    trained: dict[str, Tensor] = {n: v for n, v in state.items() if n.startswith("llama_proj.") or ".lora_" in n}
    trained = {n.replace(".default.", ".").replace(".weight", f"{spelling}.weight") if ".lora_" in n else n: v
               for n, v in trained.items()}  # fmt: skip
    prefix = "llama_model.base_model.model." if any(".lora_" in n for n in trained) else "llama_model."
    trained[f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    trained["Qformer.bert.embeddings.position_ids"] = torch.arange(8)[None]
    extra: dict[str, Any] = {"optimizer": {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}}, "scaler": None}
    config = {"model": {"arch": "minigpt_v2", "lora_r": 4, "lora_alpha": 16}, "run": {"seed": 42}}
    torch.save({"model": trained, "config": config, "epoch": 3, **extra}, folder / "checkpoint_3.pth")
    keys = {"vit_weights": "tower.pth", "ckpt": "checkpoint_3.pth"}
    if any(name.startswith("Qformer.") for name in state):
        keys["q_former_model"] = "blip2.pth"
    return {key: str(folder / name) for key, name in keys.items()}
