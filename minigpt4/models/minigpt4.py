"""MiniGPT-4 (Zhu et al. 2023): BLIP-2's Q-Former, or four merged visual tokens, and one linear projection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.schema import ModelConfig
from minigpt4.models.base_model import BaseModel
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.qformer import BLIP2_FILE, build_qformer, load_blip2
from minigpt4.models.vision import check_merge, merge_tokens
from minigpt4.models.weights import canonical_name, find_weights, read_weights


@dataclass(frozen=True)
class MiniGPT4Config(ModelConfig):
    """Defaults of MiniGPT-4 and the keys of its Q-Former."""

    arch: str = "minigpt4"
    model_type: str = "pretrain_vicuna0"
    max_txt_len: int = 32
    has_qformer: bool = True  # False: four neighbouring visual tokens are merged into one instead
    freeze_qformer: bool = True  # False trains the Q-Former and its query tokens
    num_query_token: int = 32  # query tokens of the Q-Former: positions of one image in the language model
    q_former_model: str = ""  # BLIP-2 file; "" = the published one; "random" = none
    qformer_config: dict[str, Any] = field(default_factory=dict)  # sizes over those of BLIP-2: {num_hidden_layers: 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_query_token < 1:
            raise ConfigError(f"num_query_token must be >= 1, got {self.num_query_token}")
        if self.cache_vision in ("memory", "disk") and self.has_qformer and not self.freeze_qformer:
            raise ConfigError(f"cache_vision {self.cache_vision} needs a frozen Q-Former, but freeze_qformer is False")


@registry.register("model", "minigpt4")
class MiniGPT4(GenerationMixin, BaseModel):
    """MiniGPT-4: a ViT, a Q-Former or four tokens merged into one, a linear layer, a language model."""

    Config: ClassVar[type[ModelConfig]] = MiniGPT4Config
    cfg: MiniGPT4Config

    def __init__(
        self, cfg: MiniGPT4Config, device: torch.device, dtype: torch.dtype, reads_vision: bool = True
    ) -> None:
        super().__init__(cfg, device, dtype, reads_vision)
        if cfg.has_qformer:
            path = self.weight_files(cfg).get("q_former_model")
            with torch.device("meta" if path or device.type == "meta" else "cpu"):
                self.qformer = build_qformer(self.vision.width, cfg.qformer_config)
            # A file fills every parameter, and there are no buffers: nothing random is drawn for it.
            if not path:
                self.qformer = self.qformer.to(device)
            elif reads_vision:
                self.qformer = self.qformer.to_empty(device=device)
            width, num_tokens = int(self.qformer.config.hidden_size), cfg.num_query_token
            self.query_tokens = nn.Parameter(torch.zeros(1, num_tokens, width, device=device).normal_(std=0.02))
            if path and reads_vision and device.type != "meta":
                self._load_blip2(path)
            if cfg.freeze_qformer:
                self.qformer.requires_grad_(False)
                self.query_tokens.requires_grad_(False)
        else:
            group = cfg.vision_tokens_per_position
            width, num_tokens = group * self.vision.width, self.vision.num_patches // group
        self.llama_proj = nn.Linear(width, self.hidden_size, device=device)
        self._make_encoder(num_tokens)

    def _check_tower(self) -> None:
        if not self.cfg.has_qformer:
            check_merge(self.cfg, self.vision)

    @classmethod
    def weight_files(cls, cfg: ModelConfig) -> dict[str, str]:
        """Adds the BLIP-2 file."""
        files = super().weight_files(cfg)
        assert isinstance(cfg, MiniGPT4Config)
        if cfg.has_qformer and cfg.q_former_model != "random":
            files["q_former_model"] = cfg.q_former_model or BLIP2_FILE
        return files

    @classmethod
    def vision_files(cls, cfg: ModelConfig) -> dict[str, str]:
        """The tower's and, with a Q-Former, the BLIP-2 file; none when either is random or trains."""
        assert isinstance(cfg, MiniGPT4Config)
        files = super().vision_files(cfg)
        if not cfg.has_qformer or not files:
            return files
        path = cls.weight_files(cfg).get("q_former_model")
        return {**files, "q_former_model": path} if path and cfg.freeze_qformer else {}

    def _load_vision(self) -> None:
        super()._load_vision()
        if self.cfg.has_qformer:
            self.qformer.to_empty(device=self.device)
            self._load_blip2(self.weight_files(self.cfg)["q_former_model"])

    def _load_blip2(self, path: str) -> None:
        """Q-Former, query tokens and ``ln_vision`` of a BLIP-2 file; its text branch and heads are not ours."""
        wanted = {canonical_name(n): p for n, p in self.named_parameters() if n.startswith(("qformer.", "ln_vision."))}
        wanted["query_tokens"] = self.query_tokens
        weights = read_weights(find_weights(path, "model.q_former_model"))
        self.load_reports.append(load_blip2(wanted, weights))

    def vision_features(self, images: Tensor) -> Tensor:
        """images [N, 3, S, S] -> query outputs [N, 32, 768], or merged tokens [N, P, 4C] without a Q-Former."""
        tokens = self.ln_vision(self.visual_encoder(images.to(self.vision_dtype())).float())  # [N, 1 + patches, C]
        if not self.cfg.has_qformer:
            return merge_tokens(tokens, self.vision, self.cfg.vision_tokens_per_position)
        queries = self.query_tokens.expand(len(images), -1, -1)
        attended: Tensor = self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        return attended

    def project(self, features: Tensor) -> Tensor:
        """features [N, P, C'] -> [N, P, D]."""
        projected: Tensor = self.llama_proj(features)
        return projected

    def projection_parameters(self) -> list[nn.Parameter]:
        """Weight and bias of ``llama_proj``."""
        return list(self.llama_proj.parameters())

    def frozen_without_file(self) -> list[tuple[str, nn.Parameter]]:
        """Adds a randomly built, frozen Q-Former."""
        kept = super().frozen_without_file()
        if self.cfg.has_qformer and self.cfg.freeze_qformer and self.cfg.q_former_model == "random":
            kept += [(canonical_name(n), p) for n, p in self.named_parameters() if n.startswith("qformer.")]
            kept.append(("query_tokens", self.query_tokens))
        return kept

    def _vision_parameters(self) -> list[nn.Parameter]:
        parameters = super()._vision_parameters()
        return [*parameters, *self.qformer.parameters(), self.query_tokens] if self.cfg.has_qformer else parameters
