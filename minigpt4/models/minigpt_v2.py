"""MiniGPT-v2 (Chen et al. 2023): four visual tokens per LM position, LoRA on the LM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minigpt4.common.registry import registry
from minigpt4.common.schema import ModelConfig
from minigpt4.models.base_model import BaseModel
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.vision import check_merge, merge_tokens


@dataclass(frozen=True)
class MiniGPTv2Config(ModelConfig):
    """Defaults of MiniGPT-v2."""

    arch: str = "minigpt_v2"
    model_type: str = "pretrain"
    image_size: int = 448
    lora_r: int = 64
    prompt_template: str = "[INST] {} [/INST]"
    max_txt_len: int = 300


@registry.register("model", "minigpt_v2")
class MiniGPTv2(GenerationMixin, BaseModel):
    """MiniGPT-v2: a ViT, four neighbouring tokens merged into one, a linear layer, a language model with LoRA."""

    Config: ClassVar[type[ModelConfig]] = MiniGPTv2Config

    def __init__(
        self, cfg: MiniGPTv2Config, device: torch.device, dtype: torch.dtype, reads_vision: bool = True
    ) -> None:
        super().__init__(cfg, device, dtype, reads_vision)
        group = cfg.vision_tokens_per_position
        self.llama_proj = nn.Linear(group * self.vision.width, self.hidden_size, device=device)
        self._make_encoder(self.vision.num_patches // group)

    @classmethod
    def vision_files(cls, cfg: ModelConfig) -> dict[str, str]:
        """The tower's; nothing else of the vision part has weights of a file."""
        return super().vision_files(cfg)

    def _check_tower(self) -> None:
        check_merge(self.cfg, self.vision)

    def vision_features(self, images: Tensor) -> Tensor:
        """images [N, 3, S, S] -> four (``vision_tokens_per_position``) raster neighbours per position, [N, P, 4C]."""
        tokens = self.ln_vision(self.visual_encoder(images.to(self.vision_dtype())).float())
        return merge_tokens(tokens, self.vision, self.cfg.vision_tokens_per_position)

    def project(self, features: Tensor) -> Tensor:
        """features [N, P, 4C] -> [N, P, D]."""
        projected: Tensor = self.llama_proj(features)
        return projected

    def projection_parameters(self) -> list[nn.Parameter]:
        """Weight and bias of ``llama_proj``."""
        return list(self.llama_proj.parameters())
