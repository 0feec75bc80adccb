"""A language model's directory, looked through before anything big is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.models.weights import check_file

# In the order transformers prefers them.
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_llm_directory(directory: Path, key: str = "model.llama_model") -> None:
    """Raises ConfigError for a folder that is no model, CheckpointError for shards that are absent, cut or incomplete.

    Sizes and names come from the headers; no tensor is read.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{key}: '{directory}' holds no config.json; expected a directory in Hugging Face format")
    chosen = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if chosen is None:
        raise ConfigError(f"{key}: '{directory}' holds no weights; expected one of {', '.join(_FILES)}")
    if chosen.suffix != ".json":
        _tensor_names(chosen)
        return
    shards: dict[str, set[str]] = {}
    for tensor, shard in _weight_map(chosen).items():
        shards.setdefault(str(shard), set()).add(tensor)
    absent = [shard for shard in sorted(shards) if not (directory / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{key}: {chosen} names {len(shards)} files, {len(absent)} of them are missing: {', '.join(absent[:4])}"
        )
    for shard, wanted in sorted(shards.items()):
        found = _tensor_names(directory / shard)
        lacking = sorted(wanted - found) if found is not None else []
        if lacking:
            raise CheckpointError(
                f"{key}: {directory / shard} lacks {len(lacking)} tensors that {chosen.name} expects in it, "
                f"first: {lacking[0]}"
            )


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({type(error).__name__}: {error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' is empty or no mapping")
    return weight_map


def _tensor_names(path: Path) -> set[str] | None:
    """Names in a safetensors file, after a check of its length; None for other forms, which do not list them."""
    check_file(path)
    if path.suffix != ".safetensors":
        return None
    size = path.stat().st_size
    with path.open("rb") as file:  # 8 bytes: length of the JSON header; then the header, then the data
        length = int.from_bytes(file.read(8), "little")
        header: Any = None
        if 0 < length <= size - 8:
            try:
                header = json.loads(file.read(length))
            except ValueError:
                header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a readable safetensors file (its header is damaged or cut)")
    names = {name for name in header if name != "__metadata__"}
    expected = 8 + length + max((header[name]["data_offsets"][1] for name in names), default=0)
    if size != expected:
        raise CheckpointError(f"{path}: has {size} bytes, expected {expected}; download or copy it again")
    return names
