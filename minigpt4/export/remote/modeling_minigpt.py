"""MiniGPT-4 and MiniGPT-v2 for transformers: vision tower, Q-Former (or none), linear projection, causal LM.

This file belongs to the folder it lies in and imports torch and transformers alone (and timm, for towers other than
EVA). Load it with ``AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

POOLING = ("attn_pool", "fc_norm", "head")
"""What stands behind the tokens of a timm tower; it has no weights in this folder."""


class MiniGptConfig(PretrainedConfig):
    """What the model is made of.

    vision_config     sizes of an EVA tower; None when ``timm_config`` names another one.
    timm_config       {"name": ..., further arguments of ``timm.create_model``}.
    tower_normalises  the tokens of that tower come out normalised.
    qformer_config    None: ``merged_tokens`` neighbouring patches make one position instead.
    image_token_id    stands in ``input_ids`` ``num_image_tokens`` times per image.
    """

    model_type = "minigpt_vlm"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_config": Blip2VisionConfig,
        "qformer_config": Blip2QFormerConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        qformer_config: Any = None,
        timm_config: dict[str, Any] | None = None,
        tower_normalises: bool = False,
        merged_tokens: int = 4,
        num_image_tokens: int = 0,
        image_token_id: int = -1,
        **kwargs: Any,
    ) -> None:
        text = dict(text_config) if isinstance(text_config, dict) else text_config
        if text is None or isinstance(text, dict):
            text = AutoConfig.for_model((text or {}).pop("model_type", "llama"), **(text or {}))
        self.text_config = text
        self.vision_config = Blip2VisionConfig(**vision_config) if isinstance(vision_config, dict) else vision_config
        self.qformer_config = (
            Blip2QFormerConfig(**qformer_config) if isinstance(qformer_config, dict) else qformer_config
        )
        self.timm_config = timm_config
        self.tower_normalises = tower_normalises
        self.merged_tokens = merged_tokens
        self.num_image_tokens = num_image_tokens
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


class TimmTower(nn.Module):
    """A vision transformer of timm that returns all its tokens."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        timm = importlib.import_module("timm")
        arguments = {key: value for key, value in settings.items() if key != "name"}
        self.vit = timm.create_model(settings["name"], pretrained=False, num_classes=0, **arguments)
        for name in POOLING:
            if isinstance(getattr(self.vit, name, None), nn.Module):
                setattr(self.vit, name, nn.Identity())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, 3, S, S] -> tokens [N, prefix + patches, C]."""
        tokens: Tensor = self.vit.forward_features(pixel_values)
        return tokens


class MiniGptForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers questions about images. ``pixel_values`` are all images of the batch in reading order."""

    config_class = MiniGptConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MiniGptConfig) -> None:
        super().__init__(config)
        if config.vision_config is not None:
            tower: Any = Blip2VisionModel(config.vision_config)
            tower.post_layernorm = nn.Identity()  # ln_vision stands in its place, with another epsilon
            self.vision_tower: Any = tower
            width, self.num_prefix_tokens = int(config.vision_config.hidden_size), 1
        else:
            self.vision_tower = TimmTower(dict(config.timm_config or {}))
            width = int(self.vision_tower.vit.num_features)
            self.num_prefix_tokens = int(self.vision_tower.vit.num_prefix_tokens)
        self.ln_vision = nn.Identity() if config.tower_normalises else nn.LayerNorm(width, eps=1e-5)
        self.qformer: Any = None
        if config.qformer_config is None:
            width *= config.merged_tokens
        else:
            self.qformer = Blip2QFormerModel(config.qformer_config)
            width = int(config.qformer_config.hidden_size)
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_image_tokens, width))
        self.projection = nn.Linear(width, int(config.text_config.hidden_size))
        self.language_model: Any = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        fill_buffers = getattr(module, "init_non_persistent_buffers", None)
        if callable(fill_buffers):  # position tables of some timm towers are in no file
            fill_buffers()

    def get_input_embeddings(self) -> Any:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the language model's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, 3, S, S] -> [N, P, D] in the space of the language model's embeddings."""
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        if self.config.vision_config is not None:
            tokens = self.vision_tower(pixel_values=pixel_values).last_hidden_state
        else:
            tokens = self.vision_tower(pixel_values)
        tokens = self.ln_vision(tokens)  # [N, prefix + patches, C]
        if self.qformer is None:
            patches = tokens[:, self.num_prefix_tokens :]
            width = self.config.merged_tokens * patches.shape[-1]
            features = patches.reshape(len(patches), -1, width)  # [N, P, merged * C]
        else:
            queries = self.query_tokens.expand(len(tokens), -1, -1)
            features = self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        projected: Tensor = self.projection(features.to(self.projection.weight.dtype))
        return projected

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """input_ids [B, T] and all their images -> embeddings [B, T, D].

        Raises ValueError when the image positions in the ids are not those of the images.
        """
        is_image = input_ids == self.config.image_token_id
        embeddings: Tensor = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        found = 0 if pixel_values is None else len(pixel_values) * self.config.num_image_tokens
        wanted = int(is_image.sum())
        if found != wanted:
            raise ValueError(
                f"input_ids hold {wanted} image positions, pixel_values fill {found}; "
                f"every image needs {self.config.num_image_tokens}"
            )
        if pixel_values is None:
            return embeddings
        features = self.get_image_features(pixel_values).to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(is_image.unsqueeze(-1), features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The output of the causal LM on [B, T] positions; ``labels`` [B, T] add its loss (-100 = not supervised)."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            is_start = past_key_values is None or past_key_values.get_seq_length() == 0
            # Later steps of a generation bring new text alone: their images are in the cache.
            inputs_embeds = self.embed(input_ids, pixel_values) if is_start else self.get_input_embeddings()(input_ids)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """New ids only [B, new]: the prompt is given as embeddings, so penalties on repetition do not see it."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, pixel_values)
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        parent: Any = super()
        return parent.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
