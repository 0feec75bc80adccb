"""Sampling that does not depend on the batch: every answer has a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class RowSampling(LogitsProcessor):
    """Leaves one word per row: that of the row's next uniform number in the distribution after temperature, top_k and
    top_p. The greedy choice of what is left is then a sample, whatever rows stand beside it.

    ``generate`` of transformers draws all rows from one generator: the same question would get another answer in
    another batch, after a resume, or on another number of ranks.
    """

    def __init__(
        self, seeds: Sequence[int], length: int, temperature: float, top_k: int, top_p: float, device: torch.device
    ) -> None:
        """One seed per row; ``length``: most words per answer; the others as in GenerateOptions."""
        rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self._draws = torch.stack(rows).to(device)  # [B, length]
        warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
        self._warpers = warpers

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids [B, new words so far], scores [B, V] -> [B, V], -inf but for the drawn word."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        heights = scores.float().softmax(-1).cumsum(-1)  # [B, V]
        draw = self._draws[:, input_ids.shape[1], None] * heights[:, -1:]
        # "right": a word without probability, whose step has no height, is never chosen
        chosen = torch.searchsorted(heights, draw, right=True).clamp(max=scores.shape[-1] - 1)
        left: Tensor = torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
        return left
