"""What is exported: a checkpoint of ours, or published weights that a YAML file describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common.checkpoint import Checkpoint, read_checkpoint
from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import Config, ModelConfig, ProcessorConfig
from minigpt4.processors.base import make_text_processor

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant

FULL_WEIGHTS = ("model.low_resource=False", "model.load_in_4bit=False")
"""An export needs the language model as it is on disk: quantised weights cannot be merged, nor compared exactly."""


@dataclass(frozen=True)
class Source:
    """A model on disk and its resolved configuration; no weight has been read yet."""

    config: Config
    config_path: str
    options: tuple[str, ...]
    checkpoint: Checkpoint | None
    question_processor: str

    @property
    def model(self) -> ModelConfig:
        """The configuration of the model."""
        return self.config.model

    @property
    def is_quantised(self) -> bool:
        """Whether the model was used with int8 or nf4 weights, which are not exported."""
        return self.model.low_resource or self.model.load_in_4bit

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run wrote about itself; empty for published weights."""
        return {} if self.checkpoint is None else self.checkpoint.manifest

    @property
    def title(self) -> str:
        """A name for cards: job and step, or the file of the published weights. No folders."""
        if self.checkpoint is None:
            return Path(self.model.ckpt).stem
        job = self.config.run.job_name or self.model.arch
        return f"{job}, step {self.checkpoint.step}"

    def load(self, ckpt: str = "") -> Assistant:
        """The model in float32 on the CPU. ckpt: a file whose tensors take the place of the source's own."""
        import torch

        from minigpt4.chat.loading import load_assistant

        options = [*self.options, *FULL_WEIGHTS, *([f"model.ckpt={ckpt}"] if ckpt else [])]
        weights = str(self.checkpoint.path) if self.checkpoint is not None and not ckpt else None
        return load_assistant(
            weights, self.config_path, options, torch.device("cpu"),
            question_processor=self.question_processor, merge_lora=False,
        )  # fmt: skip


def open_source(
    ckpt: str | None, cfg_path: str | None, options: Sequence[str] = (), question_processor: str = "auto"
) -> Source:
    """Read the configuration of ``ckpt`` (checkpoint or job folder), or of a YAML file with its ``model.ckpt``.

    With a YAML, ``ckpt`` may also be a published .pth. Raises ConfigError and CheckpointError.
    """
    given = tuple(options)
    if ckpt is None and cfg_path is None:
        raise ConfigError("name a checkpoint directory, or a YAML file of the model with --cfg-path")
    if ckpt is not None and Path(ckpt).is_file():
        if cfg_path is None:
            raise ConfigError(f"'{ckpt}' is a file without a configuration; name the model's YAML with --cfg-path")
        given, ckpt = (*given, f"model.ckpt={Path(ckpt).absolute()}"), None
    checkpoint = None if ckpt is None else read_checkpoint(ckpt)
    path = cfg_path or str(checkpoint.config_path if checkpoint else "")
    config = load_config(path, given, check_data=False)
    if checkpoint is None and not config.model.ckpt:
        raise ConfigError(f"{path}: model.ckpt is empty, there are no trained weights to export")
    if checkpoint is None and Path(config.model.ckpt).is_dir():
        checkpoint = read_checkpoint(config.model.ckpt)
    if question_processor == "auto":
        known = checkpoint.manifest if checkpoint else {}
        question_processor = str(known.get("question_processor", "identity"))
    make_text_processor(ProcessorConfig(name=question_processor))  # an unknown name is told before weights load
    return Source(config, path, given, checkpoint, question_processor)


def public_name(path: str) -> str:
    """A base model for cards: a hub id as it is, of a local folder or file only its own name."""
    return path if not Path(path).exists() and path.count("/") == 1 else Path(path).name
