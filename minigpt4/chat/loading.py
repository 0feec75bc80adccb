"""From a checkpoint, or a YAML file, to a model that is ready to answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.checkpoint import Checkpoint, read_checkpoint
from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.schema import TOKENIZER_TEMPLATE, ModelConfig, ProcessorConfig
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.models.load_report import check_lora_settings
from minigpt4.models.weights import read_weights
from minigpt4.processors.base import ImageProcessor, ImageSpec, TextProcessor, make_image_processor, make_text_processor

log = logging.getLogger(__name__)

CHAT_TEMPLATES = {"pretrain_vicuna0": "vicuna_v0", "pretrain_llama2": "llama2", "pretrain": "minigpt_v2"}
"""Model type -> how the published chats of that type are written; other types follow their training text."""
LEGACY_TEMPLATE = "minigpt_v2_legacy"


@dataclass(frozen=True)
class Assistant:
    """A model in eval mode with what it takes to ask it: its image and question processors and its chat template."""

    model: GenerationMixin
    image_processor: ImageProcessor
    question_processor: TextProcessor
    template: str

    def stopping(self, options: GenerateOptions) -> GenerateOptions:
        """The options, which also stop where this model's answers end: the end symbol, and the template's texts."""
        encoder, template = self.model.encoder, registry.get("template", self.template)
        return replace(
            options,
            stop=tuple(dict.fromkeys((*options.stop, *template.stop, *encoder.stop_texts))),
            stop_ids=(*options.stop_ids, *encoder.stop_ids),
        )


def template_name(model_type: str, chat_format: str = "auto") -> str:
    """The registered template of a chat: ``chat_format``, or with ``auto`` the one of the model type.

    Raises ConfigError for unknown names, and for the legacy text of MiniGPT-v2 with another model.
    """
    by_type = CHAT_TEMPLATES.get(model_type, "training")
    if chat_format == "auto":
        return by_type
    registry.get("template", chat_format)
    if chat_format == LEGACY_TEMPLATE and by_type != "minigpt_v2":
        raise ConfigError(f"chat_format {LEGACY_TEMPLATE} is for model_type pretrain (MiniGPT-v2), not {model_type}")
    return chat_format


def load_assistant(
    ckpt: str | None = None,
    cfg_path: str | None = None,
    options: Sequence[str] = (),
    device: torch.device | None = None,
    archs: Sequence[str] = (),
    question_processor: str = "auto",
    *,
    merge_lora: bool = True,
) -> Assistant:
    """Build the model of a checkpoint directory (or job folder), or of a YAML file.

    With both, the YAML says how the model is built and the checkpoint replaces its ``model.ckpt``. archs: architectures
    the caller can talk to; empty = all. merge_lora: answer without the work of separate adapters; False leaves them.
    Raises ConfigError and CheckpointError before weights load where possible.
    """
    if ckpt is None and cfg_path is None:
        raise ConfigError("name a checkpoint directory (--ckpt) or a YAML file (--cfg-path)")
    checkpoint = None if ckpt is None else read_checkpoint(ckpt)
    source = cfg_path or str(checkpoint.config_path if checkpoint else "")
    model_cfg = load_config(source, options, check_data=False).model
    if archs and model_cfg.arch not in archs:
        raise ConfigError(f"{source}: model.arch is '{model_cfg.arch}', this program talks to: {', '.join(archs)}")
    template = template_name(model_cfg.model_type, model_cfg.chat_format)
    if model_cfg.prompt_template == TOKENIZER_TEMPLATE:
        template = "training"  # published formats are for published models
    if checkpoint is None and model_cfg.ckpt and Path(model_cfg.ckpt).is_dir():
        checkpoint = read_checkpoint(model_cfg.ckpt)
    model = _build(model_cfg, checkpoint, device or choose_device())
    if merge_lora and model_cfg.lora_r:
        model.merge_lora()
    if question_processor == "auto":
        question_processor = (
            str(checkpoint.manifest.get("question_processor", "identity")) if checkpoint else "identity"
        )
    image = ImageSpec(model_cfg.image_size, model.image_mean, model.image_std)
    return Assistant(
        model,
        make_image_processor(ProcessorConfig(name="blip2_image_eval"), image),
        make_text_processor(ProcessorConfig(name=question_processor)),
        template,
    )


def _build(cfg: ModelConfig, checkpoint: Checkpoint | None, device: torch.device) -> GenerationMixin:
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    model_class: Any = registry.get("model", cfg.arch)
    weights = None
    if checkpoint is not None:
        cfg, weights = replace(cfg, ckpt=""), read_weights(checkpoint.path)
        check_lora_settings(cfg, weights)
    model: GenerationMixin = model_class.from_config(cfg, device, dtype)
    if weights is not None:
        report = model.load_weights(weights.tensors, weights.source, complete=True)
        for line in report.lines():
            log.info(line)
    return model


def choose_device(gpu_id: int = 0) -> torch.device:
    """The GPU with this number where there is one, else the CPU. Raises ConfigError for a number too high."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not 0 <= gpu_id < torch.cuda.device_count():
        raise ConfigError(f"--gpu-id {gpu_id}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", gpu_id)
