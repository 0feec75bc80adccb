"""What a model's answers depend on, told from its files without reading weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from minigpt4.common.checkpoint import MANIFEST, Checkpoint, read_checkpoint
from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError


def model_identity(
    ckpt: str | None, cfg_path: str | None, options: Sequence[str] = (), question_processor: str = "auto"
) -> dict[str, str]:
    """Names and values for ``AnswerOptions.source``; arguments as ``load_assistant`` takes them.

    A checkpoint is known by the content of its manifest, which no other training step has, and by the size of its
    weights; published weights by name and size. Raises ConfigError and CheckpointError as loading would.
    """
    if ckpt is None and cfg_path is None:
        raise ConfigError("name a checkpoint directory (--ckpt) or a YAML file (--cfg-path)")
    checkpoint = None if ckpt is None else read_checkpoint(ckpt)
    model = load_config(cfg_path or str(checkpoint and checkpoint.config_path), options, check_data=False).model
    if checkpoint is None and model.ckpt and Path(model.ckpt).is_dir():
        checkpoint = read_checkpoint(model.ckpt)
    weights = _file_identity(model.ckpt) if checkpoint is None else _checkpoint_identity(checkpoint)
    return {
        "weights": weights,
        "language_model": Path(model.llama_model).name,
        "options": " ".join(options),
        "question_processor": question_processor,
    }


def _checkpoint_identity(checkpoint: Checkpoint) -> str:
    content = hashlib.sha256((checkpoint.path / MANIFEST).read_bytes())
    content.update(checkpoint.config_path.read_bytes())
    return f"step {checkpoint.step}, {content.hexdigest()[:16]}"


def _file_identity(path: str) -> str:
    file = Path(path)
    return f"{file.name}, {file.stat().st_size} bytes" if path and file.is_file() else path
