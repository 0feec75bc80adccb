"""A training step done the reference's way on this project's modules and weights: the other side of ``train_step.py``.

Facts of MiniGPT-v2's loop: tokenises inside the forward; pads contexts to the longest context and answers to the
longest answer, then joins them; eager attention in both transformers; float32 logits at every position; mean loss
over supervised tokens; gradients summed over the accumulation window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4.common.types import IGNORE_INDEX, IMAGE_TAG
from minigpt4.models.generation import GenerationMixin


class ReferenceLoop:
    """The forward of the reference for instruction samples with one image each."""

    def __init__(self, model: GenerationMixin) -> None:
        self.model = model
        self.tokenizer, self.encoder = model.encoder.tokenizer, model.encoder
        self.lm: Any = model._lm
        self.lm.set_attn_implementation("eager")
        self.lm.config.use_cache = True  # left on in training by the reference
        for module in model.visual_encoder.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False

    def loss(self, images: Tensor, instructions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """images [B, 3, S, S] and their texts -> mean loss over supervised tokens."""
        embed: nn.Module = self.lm.get_input_embeddings()
        with torch.no_grad():
            features = self.model.vision_features(images)
        image_embeds = self.model.project(features)  # [B, P, D]
        contexts = [self._context(embed, text, image) for text, image in zip(instructions, image_embeds, strict=True)]
        lengths = [len(context) for context in contexts]
        pad = embed(torch.tensor([self.tokenizer.pad_id]))  # [1, D]
        width = max(lengths)
        padded = torch.stack([torch.cat([c, pad.expand(width - len(c), -1)]) for c in contexts])  # [B, C, D]
        ids, mask = self._answers(answers)  # [B, A]
        answer_embeds = embed(ids)
        bos = embed(torch.tensor([self.tokenizer.bos_id]))
        rows, masks, targets = [], [], []
        for row, length in enumerate(lengths):
            rows.append(torch.cat([bos, padded[row, :length], answer_embeds[row], padded[row, length:]]))
            tail = torch.zeros(width - length, dtype=torch.long)
            masks.append(torch.cat([torch.ones(1 + length, dtype=torch.long), mask[row], tail]))
            target = ids[row].masked_fill(mask[row] == 0, IGNORE_INDEX)
            before = torch.full((1 + length,), IGNORE_INDEX)
            targets.append(torch.cat([before, target, torch.full((width - length,), IGNORE_INDEX)]))
        output = self.lm(inputs_embeds=torch.stack(rows), attention_mask=torch.stack(masks))
        logits = output.logits.float()  # [B, T, V]
        shifted = torch.stack(targets)[:, 1:].reshape(-1)
        return functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), shifted, ignore_index=IGNORE_INDEX
        )

    def _context(self, embed: nn.Module, instruction: str, image: Tensor) -> Tensor:
        text = instruction
        if self.encoder.wrap:
            text = self.encoder.prompt_template.replace("{}", instruction)
        before, after = (embed(torch.tensor(self.tokenizer.encode(part))) for part in text.split(IMAGE_TAG))
        return torch.cat([before, image, after])

    def _answers(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, longest answer], right padded, cut at max_txt_len."""
        ids = [self.tokenizer.encode(a + self.encoder.end_sym)[: self.encoder.max_txt_len] for a in answers]
        width = max(map(len, ids))
        rows = torch.tensor([row + [self.tokenizer.pad_id] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        return rows, mask
