"""Exported files read back by the classes of transformers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.errors import CheckpointError


def library() -> Any:
    """transformers; its Auto classes carry no types."""
    return importlib.import_module("transformers")


def read_model(class_name: str, folder: Path, **options: Any) -> Any:
    """A model in float32 and eval mode. Raises CheckpointError when a load left tensors out or made some up."""
    model_class = getattr(library(), class_name)
    model, report = model_class.from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True, **options)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(key) or ())
        if names:
            raise CheckpointError(f"{class_name}: {len(names)} {key.replace('_', ' ')} on loading, first: {names[0]}")
    return model.eval()


def read_processor(class_name: str, folder: Path, **options: Any) -> Any:
    """A tokenizer, an image processor or both."""
    return getattr(library(), class_name).from_pretrained(str(folder), **options)
