"""The trained model as parts: its language model with LoRA merged, its vision tower under the names of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import ModelConfig
from minigpt4.export.reading import library
from minigpt4.models.llm import causal_lm

if TYPE_CHECKING:
    from minigpt4.export.source import Source
    from minigpt4.models.generation import GenerationMixin

PROJECTION = "llama_proj."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EVA_SIZES = {"patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"}
_TO_BLIP2 = (
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
_EMBEDDINGS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}


def is_eva(cfg: ModelConfig) -> bool:
    """Whether the tower is BLIP-2's, which transformers has too."""
    return cfg.vit_model in ("eva_clip_g", "eva")


def has_qformer(cfg: ModelConfig) -> bool:
    """Whether a Q-Former stands between tower and projection."""
    return bool(getattr(cfg, "has_qformer", False))


def refuse_unknown_arch(source: Source) -> None:
    """Raises ConfigError for architectures of plugins and for towers nothing but this repository can build."""
    cfg = source.model
    if cfg.arch not in ("minigpt4", "minigpt_v2"):
        raise ConfigError(
            f"model.arch '{cfg.arch}' has no code outside this repository; known: minigpt4, minigpt_v2. "
            "--to pth keeps its trained tensors"
        )
    other = sorted(set(cfg.vit_config) - _EVA_SIZES) if is_eva(cfg) else []
    if other:
        raise ConfigError(
            f"model.vit_config: '{other[0]}' makes a tower that transformers' EVA cannot be; "
            f"exported are: {', '.join(sorted(_EVA_SIZES))}"
        )


def refuse_other_projection(model: GenerationMixin) -> nn.Linear:
    """The projection. Raises ConfigError for an architecture whose projection is not one linear layer."""
    projection = getattr(model, "llama_proj", None)
    if not isinstance(projection, nn.Linear):
        raise ConfigError(f"model.arch '{model.cfg.arch}' has no linear llama_proj; only --to pth can export it")
    return projection


def other_tensors(model: GenerationMixin) -> dict[str, Tensor]:
    """What the checkpoint keeps besides the language model and the projection: a tower that trained, or is random."""
    kept = [*model.trainable_parameters_by_name(), *model.frozen_without_file()]
    return {name: value.detach() for name, value in kept if not name.startswith(("llama_model.", PROJECTION))}


def merge_lora(model: GenerationMixin) -> Any:
    """Add LoRA to the matrices it belongs to, in place; returns the plain causal LM."""
    if hasattr(model.llama_model, "merge_and_unload"):
        model.llama_model = model.llama_model.merge_and_unload()
    return causal_lm(model.llama_model)


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to ``dtype``, in place. Buffers stay: those that are in no file (rotary frequencies) are float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def base_config(cfg: ModelConfig) -> Any:
    """The language model's own configuration, as it is on disk."""
    return library().AutoConfig.from_pretrained(cfg.llama_model)


def stored_dtype(cfg: ModelConfig, wanted: str) -> torch.dtype:
    """The dtype to write: a named one, or for 'auto' that of the language model on disk."""
    if wanted != "auto":
        return DTYPES[wanted]
    found = base_config(cfg).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """float32, float16 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def vision_state(model: GenerationMixin) -> dict[str, Tensor]:
    """The tower: transformers' names for EVA, timm's own for every other."""
    tower = model.visual_encoder.state_dict()
    if not is_eva(model.cfg):
        return dict(tower)
    state = {}
    for name, value in tower.items():
        if name.endswith("attn.v_bias"):
            continue  # written with q_bias
        if name.endswith("attn.q_bias"):  # one bias for q, k, v; the one of k is zero
            bias = torch.cat([value, torch.zeros_like(value), tower[name.replace("q_bias", "v_bias")]])
            state[blip2_vision_name(name.replace("q_bias", "qkv.bias"))] = bias
        else:
            state[blip2_vision_name(name)] = value
    return state


def blip2_vision_name(name: str) -> str:
    """A tensor of timm's Eva -> the same one of transformers' Blip2VisionModel."""
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    name = f"encoder.layers.{name.removeprefix('blocks.')}"
    for ours, theirs in _TO_BLIP2:
        name = name.replace(ours, theirs)
    return name


def blip2_vision_sizes(model: GenerationMixin) -> dict[str, Any]:
    """Arguments of ``Blip2VisionConfig`` for an EVA tower."""
    tower: Any = model.visual_encoder
    return {
        "hidden_size": int(model.vision.width),
        "intermediate_size": int(tower.blocks[0].mlp.fc1.out_features),
        "num_hidden_layers": len(tower.blocks),
        "num_attention_heads": int(tower.blocks[0].attn.num_heads),
        "image_size": int(model.cfg.image_size),
        "patch_size": int(tower.patch_embed.patch_size[0]),
    }


def whole_state(model: GenerationMixin) -> dict[str, Tensor]:
    """Every tensor under the names of the exported class. LoRA must be merged."""
    state = {f"vision_tower.{name}": value for name, value in vision_state(model).items()}
    state |= {f"ln_vision.{name}": value for name, value in model.ln_vision.state_dict().items()}
    if has_qformer(model.cfg):
        qformer: Any = model.qformer
        query_tokens: Any = model.query_tokens
        state |= {f"qformer.{name}": value for name, value in qformer.state_dict().items()}
        state["query_tokens"] = query_tokens.detach()
    state |= {f"projection.{name}": value for name, value in refuse_other_projection(model).state_dict().items()}
    state |= {f"language_model.{name}": value for name, value in causal_lm(model.llama_model).state_dict().items()}
    return state
