"""What a language model does with embeddings, found out by running a few of them.

Families differ in ways no common setting tells: some scale or cap their logits after the head, some read token ids in
every layer, some let packed samples see each other. A wrong guess would train on another loss without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError
from minigpt4.models.attention import use_packed_attention
from minigpt4.models.last_layer import narrow_last_layer
from minigpt4.models.losses import LogitShape

_IDS = (5, 9, 6, 11, 7, 10, 8, 12)
_OTHER_IDS = (9, 5, 11, 6)
_FIRST = 4  # length of the first of two packed samples


@dataclass(frozen=True)
class Traits:
    """What training must know of a language model.

    logits                what happens to them after the head.
    attends_by_sample     whether attention takes the lengths of packed samples; then a packed row costs what its
                          samples cost.
    keeps_samples_apart   whether samples may share a row at all.
    ends_narrow           whether its last layer can be computed at wanted positions alone.
    """

    logits: LogitShape
    attends_by_sample: bool
    keeps_samples_apart: bool
    ends_narrow: bool = False


def logit_shape(config: Any) -> LogitShape:
    """What ``config`` of a transformers model says about its logits: Gemma 2 caps them, Cohere and Granite scale."""
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None) or 0.0
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return LogitShape(float(scale) / float(scaling), float(cap))


@torch.no_grad()
def examine(llm: Any, name: str) -> Traits:
    """Run ``llm``, a causal LM of transformers, on eight words in a few ways, and make it attend sample by sample where
    that works. On the meta device its config is believed.

    Raises ConfigError for a model that cannot be used: one that is not causal, that reads token ids besides
    embeddings, or whose logits are not those of its head.
    """
    config = llm.config.get_text_config(decoder=True)
    what = f"model.llama_model: '{name}' (model_type {llm.config.model_type})"
    if config is not llm.config:
        raise ConfigError(f"{what} is a model of several parts, such as a vision-language model; give a text model")
    shape = logit_shape(config)
    by_sample = use_packed_attention(llm)
    ends_narrow = narrow_last_layer(llm)
    if llm.device.type == "meta":
        return Traits(shape, by_sample, True, ends_narrow)
    was_training = llm.training
    llm.eval()
    try:
        probe = _Probe(llm, shape)
        problem = probe.problem()
        if problem:
            raise ConfigError(f"{what} {problem}")
        if by_sample and not probe.keeps_apart(by_sample=True):  # the lengths do not reach its attention
            llm.set_attn_implementation("sdpa")
            by_sample = False
        keeps_apart = by_sample or probe.keeps_apart(by_sample=False)
        return Traits(shape, by_sample, keeps_apart, ends_narrow and probe.narrows())
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise ConfigError(f"{what} does not run on embeddings: {str(error).splitlines()[0]}") from error
    finally:
        llm.train(was_training)


class _Probe:
    """Comparisons on one model. ``same``: allowed between calls of the same shapes; ``close``: of different ones."""

    def __init__(self, llm: Any, shape: LogitShape) -> None:
        self.llm, self.shape = llm, shape
        self.ids = torch.tensor([_IDS], device=llm.device)  # [1, 8]
        self.embeddings: Tensor = llm.get_input_embeddings()(self.ids)
        if getattr(llm, "is_loaded_in_8bit", False):
            self.same, self.close = 0.1, 0.2  # int8 picks its outlier columns from all words of a call: 2 % measured
        elif self.embeddings.dtype == torch.float32:
            self.same, self.close = 1e-4, 1e-3
        else:
            self.same, self.close = 1e-2, 0.2

    def hidden(self, embeddings: Tensor, **options: Any) -> Tensor:
        """embeddings [1, T, D] -> [1, T, D], as training computes it."""
        output = self.llm.get_decoder()(inputs_embeds=embeddings, attention_mask=None, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def problem(self) -> str:
        """Why the model cannot be used, or an empty text."""
        by_ids = self.llm(input_ids=self.ids, use_cache=False).logits
        by_embeddings = self.llm(inputs_embeds=self.embeddings, use_cache=False).logits
        if _difference(by_ids, by_embeddings) > self.same:
            return "reads token ids besides embeddings, which pictures do not have"
        hidden = self.hidden(self.embeddings)
        changed = self.embeddings.clone()
        changed[:, -1] = self.embeddings[:, 0]
        if _difference(hidden[:, :-1], self.hidden(changed)[:, :-1]) > self.same:
            return "is not causal: its words see later words"
        ours = self.shape(self.llm.get_output_embeddings()(hidden).float())
        # a cap that is not known to us bends the logits by a percent or so: less than half precision would excuse
        tolerance = self.same if self.shape.changes else 1e-3
        if _difference(by_embeddings, ours) > tolerance:
            return "computes its logits in a way that is not known here; its loss would be another one"
        return ""

    def keeps_apart(self, by_sample: bool) -> bool:
        """Whether the second of two packed samples is what it is alone, whatever the first one says."""
        lengths = (_FIRST, len(_IDS) - _FIRST)
        positions = torch.cat([torch.arange(n, device=self.llm.device) for n in lengths])[None]  # [1, 8]
        options: dict[str, Any] = {"position_ids": positions}
        if by_sample:
            options["sample_lengths"] = lengths
        others = torch.tensor([_OTHER_IDS], device=self.llm.device)
        second = self.embeddings[:, _FIRST:]
        changed = torch.cat([self.llm.get_input_embeddings()(others), second], dim=1)
        packed = self.hidden(self.embeddings, **options)[:, _FIRST:]
        is_deaf = _difference(packed, self.hidden(changed, **options)[:, _FIRST:]) <= self.same
        return is_deaf and _difference(packed, self.hidden(second)) <= self.close

    def narrows(self) -> bool:
        """Whether its last layer, told which positions are wanted, gives theirs and no other."""
        wanted = torch.tensor([1, _FIRST, len(_IDS) - 1], device=self.llm.device)
        try:
            narrow = self.hidden(self.embeddings, wanted=wanted)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):  # such as a keyword nobody hands on
            return False
        whole = self.hidden(self.embeddings)[:, wanted]
        return narrow.shape == whole.shape and _difference(whole, narrow) <= self.close


def _difference(one: Tensor, other: Tensor) -> float:
    """Length of the difference relative to that of ``one``, at the position where it is largest; both [..., D]."""
    one, other = one.float(), other.float()
    return float(((one - other).norm(dim=-1) / one.norm(dim=-1).clamp_min(1e-12)).max())
