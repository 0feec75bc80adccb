"""A training step done the reference's way: the other side of ``train_step.py``.

Facts of MiniGPT-v2's loop: it tokenises inside the forward; pads contexts to the longest context and answers to the
longest answer, then joins them; eager attention in both transformers; a key-value cache in training; float32 logits at
every position; mean loss over supervised tokens. The language model is transformers' and the adapters are peft's,
untouched: nothing this project does to them reaches this loop. Both are newer than the reference's own versions, and a
little faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional

from minigpt4.common.types import IGNORE_INDEX, IMAGE_TAG
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.llm import causal_lm


class ReferenceLoop:
    """The forward of the reference for instruction samples with one image each, on a copy of ``model``'s weights.

    ``recompute``: the reference's ``use_grad_checkpoint_llm`` (re-entrant, as there). ``copies``: False takes the
    language model of ``model`` itself, which must have been built of the libraries' own layers (for models too large to
    be held twice). ``keeps_outputs``: logits and key-value cache live until the next step, as in the fork.
    """

    def __init__(
        self, model: GenerationMixin, recompute: bool = False, copies: bool = True, keeps_outputs: bool = False
    ) -> None:
        self.model, self.encoder, self.tokenizer = model, model.encoder, model.encoder.tokenizer
        llm = stock_language_model(model).train(model.training) if copies else model.llama_model
        self.lm: Any = causal_lm(llm)
        self.keeps_outputs = keeps_outputs
        self.kept: tuple[Any, ...] = ()
        if recompute:
            self.lm.gradient_checkpointing_enable({"use_reentrant": True})
        self.set_switches("eager", not recompute)
        trained = [parameter for parameter in self.lm.parameters() if parameter.requires_grad]
        self.parameters: list[nn.Parameter] = [*trained, *model.projection_parameters()]

    def set_switches(self, attention: str, use_cache: bool) -> None:
        """Attention of both transformers, ``eager`` (the reference's) or ``sdpa``; a key-value cache in training."""
        self.lm.set_attn_implementation(attention)
        self.lm.config.use_cache = use_cache
        for module in self.model.visual_encoder.modules():
            if isinstance(module, EvaAttention):
                module.fused_attn = attention == "sdpa"

    def loss(self, images: Tensor, instructions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """images [B, 3, S, S] and their texts -> mean loss over supervised tokens."""
        embeddings, mask, targets = self.inputs(images, instructions, answers)
        outputs = self.lm(inputs_embeds=embeddings, attention_mask=mask)
        logits = outputs.logits.float()  # [B, T, V]
        self.kept = (outputs, logits) if self.keeps_outputs else ()
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        return functional.cross_entropy(flat, targets[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX)

    def inputs(
        self, images: Tensor, instructions: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, T, D], attention mask [B, T] and targets [B, T]; T = 1 + longest context + longest answer."""
        embed: nn.Module = self.lm.get_input_embeddings()
        with torch.no_grad():
            features = self.model.vision_features(images)
        image_embeds = self.model.project(features)  # [B, P, D]
        contexts = [self._context(embed, text, image) for text, image in zip(instructions, image_embeds, strict=True)]
        lengths = [len(context) for context in contexts]
        width = max(lengths)
        pad = embed(self._ids([self.tokenizer.pad_id]))  # [1, D]
        padded = torch.stack([torch.cat([c, pad.expand(width - len(c), -1)]) for c in contexts])  # [B, C, D]
        ids, is_real = self._answers(answers)  # [B, A]
        answer_embeds = embed(ids)
        bos = embed(self._ids([self.tokenizer.bos_id]))
        rows, masks, targets = [], [], []
        for row, length in enumerate(lengths):
            rows.append(torch.cat([bos, padded[row, :length], answer_embeds[row], padded[row, length:]]))
            tail = self._ids([0] * (width - length))
            masks.append(torch.cat([self._ids([1] * (1 + length)), is_real[row], tail]))
            target = ids[row].masked_fill(is_real[row] == 0, IGNORE_INDEX)
            ignored = self._ids([IGNORE_INDEX] * (1 + width))
            targets.append(torch.cat([ignored[: 1 + length], target, ignored[1 + length :]]))
        return torch.stack(rows), torch.stack(masks), torch.stack(targets)

    def _context(self, embed: nn.Module, instruction: str, image: Tensor) -> Tensor:
        text = self.encoder.prompt_template.replace("{}", instruction) if self.encoder.wrap else instruction
        before, after = (embed(self._ids(self.tokenizer.encode(part))) for part in text.split(IMAGE_TAG))
        return torch.cat([before, image, after])

    def _answers(self, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, longest answer], right padded, cut at max_txt_len."""
        ids = [self.tokenizer.encode(a + self.encoder.end_sym)[: self.encoder.max_txt_len] for a in answers]
        width = max(map(len, ids))
        rows = self._ids([row + [self.tokenizer.pad_id] * (width - len(row)) for row in ids])
        mask = self._ids([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        return rows, mask

    def _ids(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.model.device)


def stock_language_model(model: GenerationMixin) -> Any:
    """The language model of ``model`` as transformers and peft build it, with eager attention and equal weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = model.cfg
    if cfg.llama_weights == "random":  # there is no file: the weights come below
        llm: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.llama_model), dtype=torch.float32)
    else:
        llm = AutoModelForCausalLM.from_pretrained(cfg.llama_model, dtype=torch.float32)
    llm.requires_grad_(False)
    adapters = LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=list(cfg.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    llm = get_peft_model(llm, adapters)
    llm.load_state_dict(model.llama_model.state_dict(), strict=True)
    return llm
