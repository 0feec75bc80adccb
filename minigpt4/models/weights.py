"""Files of weights: where they are, what they hold, and one name per tensor whatever spelled it."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.download import download, is_url
from minigpt4.common.errors import CheckpointError, ConfigError

LORA_KEYS = ("lora_r", "lora_alpha", "lora_target_modules")
"""Keys of ``model`` that decide what LoRA matrices mean."""

_LORA = re.compile(r"\.(lora_[AB])(?:\.[^.]+)?\.weight$")
_WRAPPERS = ("model", "module", "state_dict")  # keys under which training files hold their tensors
_ORIGINS = {
    "eva_vit_g.pth": "the vision tower that BLIP-2 published (EVA-CLIP ViT-g/14)",
    "blip2_pretrained_flant5xxl.pth": "the Q-Former that BLIP-2 published (for FlanT5-XXL)",
}
_QFORMER_NAMES = (
    ("layernorm.", "embeddings.LayerNorm."),
    (".attention.attention.", ".attention.self."),
    (".crossattention.attention.", ".crossattention.self."),
)


def weights_root() -> Path:
    """Where downloaded weights are looked for: MINIGPT4_WEIGHTS, else ``weights`` in the current directory."""
    return Path(os.environ.get("MINIGPT4_WEIGHTS") or "weights")


def find_weights(path: str, key: str) -> Path:
    """The file or folder ``path``, the file of that name in the weights folder, or a download into that folder.

    Raises ConfigError that says where was looked, what the file is, and where to put it.
    """
    if is_url(path):
        return download(path, weights_root(), key)
    places = list(dict.fromkeys((Path(path).expanduser(), weights_root() / Path(path).name)))
    for place in places:
        if place.exists():
            return place
    name = Path(path).name
    origin = f". It is {_ORIGINS[name]}; docs/WEIGHTS.md says where to get it" if name in _ORIGINS else ""
    raise ConfigError(
        f"{key}: '{path}' not found; looked in {', '.join(str(place.absolute()) for place in places)}{origin}. "
        f"Put the file at {weights_root() / name}, or set {key} to its path or web address"
    )


def find_all(files: Mapping[str, str]) -> dict[str, Any]:
    """Paths that exist, after downloads, of what each key of ``model`` names. Raises ConfigError with all that miss."""
    found: dict[str, Any] = {}
    problems = []
    for key, path in files.items():
        try:
            found[key] = str(find_weights(path, f"model.{key}"))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and the LoRA settings (``LORA_KEYS``) that the file's own configuration names, if it has one."""

    source: str
    tensors: dict[str, Tensor]
    lora: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: Path) -> Weights:
    """Open a .safetensors file, a .pth/.bin file (no code in it is run) or a checkpoint folder, without copying it.

    Tensors are mapped from the file and read when used. A training file holds them under ``model``; a folder is read
    as ``read_checkpoint`` reads it (a step, a job, or a folder of jobs). Raises CheckpointError when the file is not
    readable or the folder incomplete.
    """
    if path.is_dir():
        checkpoint = read_checkpoint(path)
        try:
            config = yaml.safe_load(checkpoint.config_path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise CheckpointError(f"{checkpoint.config_path}: not readable as YAML ({error})") from error
        return Weights(str(path), checkpoint.load_weights(), _lora_settings(config))
    check_file(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return Weights(str(path), load_file(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    content = _load_pickled(path)
    state: Any = content
    for key in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return Weights(str(path), tensors, _lora_settings(content.get("config")))


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of ``read_weights``."""
    return read_weights(path).tensors


def check_file(path: Path) -> None:
    """Raises CheckpointError for a file that is absent, a pointer, a web page, or a zip archive cut short."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull' where it is from")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path}: is a web page, not weights; download the file itself")
    if not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):
        raise CheckpointError(f"{path}: is cut short at {path.stat().st_size} bytes; download or copy it again")


def _load_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors and plain types only; mapped from the file where its form allows that."""
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not is_zip and file.read(1) != b"\x80":  # how a pickle, the older form, starts
            raise CheckpointError(f"{path}: not a readable weights file (neither safetensors nor of torch.save)")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {foreign[1]}, and loading that runs code" if foreign else str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable weights-only file ({reason})") from error
    except (RuntimeError, EOFError, LookupError, ValueError) as error:  # what damaged pickles end in
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable weights-only file ({reason})") from error


def _lora_settings(config: Any) -> dict[str, Any]:
    model = config.get("model") if isinstance(config, dict) else None
    return {key: model[key] for key in LORA_KEYS if key in model} if isinstance(model, dict) else {}


def published_name(name: str) -> str:
    """``qformer.encoder...`` of transformers -> ``Qformer.bert.encoder...`` of BLIP-2 files."""
    inner = name.removeprefix("qformer.")
    for ours, theirs in _QFORMER_NAMES:
        inner = theirs + inner.removeprefix(ours) if inner.startswith(ours) else inner.replace(ours, theirs)
    return f"Qformer.bert.{inner}"


def canonical_name(name: str) -> str:
    """The published name of one of our parameters (also accepts published names of any peft version).

    LoRA: ``....lora_A.weight`` under ``llama_model.base_model.model.``; base tensors without peft's infixes.
    """
    name = name.removeprefix("module.")
    if name.startswith("qformer."):
        return published_name(name)
    if not name.startswith("llama_model."):
        return name
    name = name.replace(".base_layer.", ".").replace(".lm_head.0.", ".lm_head.")
    if _LORA.search(name):
        return _LORA.sub(r".\1.weight", name)
    return name.replace("llama_model.base_model.model.", "llama_model.", 1)


def is_lora(name: str) -> bool:
    """Whether a canonical name is a LoRA matrix."""
    return _LORA.search(name) is not None


def part_of(name: str) -> str:
    """The part a canonical name belongs to, for reports: LoRA, llama_proj, llama_model, visual_encoder, ..."""
    return "LoRA" if is_lora(name) else name.split(".", 1)[0]
