"""Which files and settings the frozen vision part of a model comes from, without reading the files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict

from minigpt4.common.schema import ModelConfig
from minigpt4.models.weights import find_weights

_NOT_VISION = frozenset(
    "model_type vit_weights q_former_model vit_precision drop_path_rate use_grad_checkpoint freeze_vit freeze_qformer "
    "llama_model llama_weights low_resource load_in_4bit lora_r lora_alpha lora_dropout lora_target_modules "
    "use_grad_checkpoint_llm freeze_llm prompt_path prompt_template chat_template max_txt_len max_context_len end_sym "
    "chat_format cache_vision ckpt".split()
)
"""Keys of ``model`` that do not change features, or only by way of the weights and the dtype, which are hashed."""

_LAYOUT = 1  # counts the ways in which files of vision weights were ever read


def vision_settings(cfg: ModelConfig) -> str:
    """The settings of ``model`` that may reach features, as one text."""
    return str(sorted((key, value) for key, value in asdict(cfg).items() if key not in _NOT_VISION))


def vision_key(model_class: type, cfg: ModelConfig, files: Mapping[str, str]) -> str:
    """A hash of everything that decides the vision weights but the bytes in ``files``, for which size, times and inode
    stand; "" where that says nothing of the bytes (a folder). Reads no weights.

    files: key of ``model`` -> file of the vision part. The libraries count too: another timm may name weights anew.
    """
    facts: list[object] = [_LAYOUT, f"{model_class.__module__}.{model_class.__qualname__}", vision_settings(cfg)]
    facts += [importlib.metadata.version(name) for name in ("torch", "timm", "transformers")]
    for key, path in sorted(files.items()):
        place = find_weights(path, f"model.{key}").resolve()
        if not place.is_file():
            return ""
        stat = place.stat()
        facts.append([key, str(place), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
