"""Tensor names and files: one name per tensor whatever spelled it, and a report of every load."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.models.qformer import published_name

_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_LORA = re.compile(r"\.(lora_[AB])(?:\.[^.]+)?\.weight$")


def weights_root() -> Path:
    """Where downloaded weights are looked for: MINIGPT4_WEIGHTS, else ``weights`` in the current directory."""
    return Path(os.environ.get("MINIGPT4_WEIGHTS", "weights"))


def find_weights(path: str, key: str) -> Path:
    """The file ``path``, or its name under the weights folder. Raises ConfigError that says where to put it."""
    for candidate in (Path(path), weights_root() / Path(path).name):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{key}: '{path}' not found; put the file at {weights_root() / Path(path).name} or set {key}")


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, a .pth/.bin file (read without running pickled code) or a checkpoint folder.

    A published training file holds them under ``model``; a folder is read as ``read_checkpoint`` reads it (a step, a
    job, or a folder of jobs). Raises CheckpointError when the file is not readable or the folder incomplete.
    """
    if path.is_dir():
        return read_checkpoint(path).load_weights()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    import pickle

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: not a readable weights-only file ({str(error).splitlines()[0]})") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors


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


@dataclass
class LoadReport:
    """What a load did, by part: numbers of tensors loaded and the names that were left over."""

    source: str
    loaded: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line per part, for the log and the manifest."""
        rows = [f"{self.source}: {count} tensors of {part}" for part, count in sorted(self.loaded.items())]
        absent = sorted({part_of(name) for name in self.missing})
        rows += [f"{self.source}: no tensors of {part}; it keeps its initial values" for part in absent]
        return rows


def match_weights(
    parameters: Mapping[str, Tensor], trained: Iterable[str], state: Mapping[str, Tensor], source: str, complete: bool
) -> tuple[dict[str, Tensor], LoadReport]:
    """Pair the tensors of a file with parameters by canonical name.

    parameters: canonical name -> tensor of the model. trained: the canonical names that train.
    complete: every trained tensor must be in the file (a finished checkpoint); otherwise a part may be absent as a
    whole (stage 1 weights have no LoRA), but never in pieces. Returns canonical name -> value to copy, and the report.
    Raises CheckpointError for unknown names, wrong shapes, missing trained tensors and LoRA matrices that do not apply.
    """
    offered = {canonical_name(name): value for name, value in state.items()}
    report = LoadReport(source, ignored=sorted(name for name in offered if _BUFFERS.search(name)))
    values = {name: value for name, value in offered.items() if name in parameters}
    unknown = sorted(set(offered) - set(values) - set(report.ignored))
    problems: list[str] = []
    lora_unknown = [name for name in unknown if is_lora(name)]
    if lora_unknown:
        problems.append(
            f"{len(lora_unknown)} LoRA matrices in the file do not apply, first: {lora_unknown[0]} "
            "(check lora_r and lora_target_modules)"
        )
    others = [name for name in unknown if not is_lora(name)]
    if others:
        problems.append(f"{len(others)} tensors are unknown to this model, first: {others[0]}")
    for name, value in values.items():
        if value.shape != parameters[name].shape:
            hint = " (check lora_r)" if is_lora(name) else ""
            problems.append(f"{name}: file {list(value.shape)}, model {list(parameters[name].shape)}{hint}")
    report.missing = sorted(set(trained) - set(values))
    present = {part_of(name) for name in values}
    bad = [name for name in report.missing if complete or part_of(name) in present]
    if bad:
        problems.append(f"{len(bad)} trained tensors are missing in the file, first: {bad[0]}")
    if not values:
        problems.append("no tensor of the file fits this model")
    if problems:
        raise CheckpointError("\n".join(f"{source}: {problem}" for problem in problems[:8]))
    for name in values:
        report.loaded[part_of(name)] = report.loaded.get(part_of(name), 0) + 1
    return values, report
