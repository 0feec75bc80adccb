"""Operations of a training step by formula: a multiplication with its addition counts as two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """A ViT over ``tokens`` positions of one picture, and a constant for what comes behind it (Q-Former)."""

    width: int
    depth: int
    mlp: int
    tokens: int
    patch: int = 14
    behind: float = 0.0


@dataclass(frozen=True)
class Decoder:
    """A Llama with LoRA of ``rank`` on the query and value projections."""

    width: int
    layers: int
    mlp: int
    words: int
    rank: int = 0


def tower_flops(tower: Tower) -> float:
    """Of one picture."""
    n, d = tower.tokens, tower.width
    blocks = tower.depth * (2 * n * (4 * d * d + 2 * d * tower.mlp) + 4 * n * n * d)
    return float(blocks + 2 * (n - 1) * 3 * tower.patch**2 * d + tower.behind)


def decoder_flops(decoder: Decoder, length: int, supervised: int) -> float:
    """Forward and backward of one sample with frozen weights, nothing recomputed.

    ``length`` positions attend causally, the head sees ``supervised`` of them. Frozen weights need the gradient of
    their input alone: the backward of a product costs what its forward costs, attention 2.5 times, LoRA twice.
    """
    linear = 2 * length * decoder.layers * (4 * decoder.width**2 + 3 * decoder.width * decoder.mlp)
    attention = 2 * length**2 * decoder.width * decoder.layers
    head = 2 * supervised * decoder.width * decoder.words
    adapters = 2 * length * decoder.layers * 4 * decoder.width * decoder.rank
    return float(2 * linear + 3.5 * attention + 2 * head + 3 * adapters)


def step_flops(tower: Tower | None, decoder: Decoder, samples: Sequence[tuple[int, int]]) -> float:
    """Of samples given as (length, supervised), one picture each; ``tower`` None: features are given."""
    vision = tower_flops(tower) * len(samples) if tower else 0.0
    return vision + sum(decoder_flops(decoder, length, supervised) for length, supervised in samples)
