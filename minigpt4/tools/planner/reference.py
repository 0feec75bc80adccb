"""Memory of the published training loops, by formula, to compare with.

Their activations were counted operation by operation at 7B with 448-pixel images (S = 407 and 1300 positions): fp16
base, eager attention, RMSNorm and rotary embedding written out in PyTorch, LoRA through peft, logits at every position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minigpt4.tools.planner.estimate import CONTEXT
from minigpt4.tools.planner.skeleton import PartBytes
from minigpt4.tools.planner.workload import Row

REFERENCES = ("upstream", "fork")
_PER_POSITION = 5.69e6  # bytes, 32 layers of width 4096
_PER_PAIR = 8.2e3  # bytes, 32 layers of 32 heads: fp32 softmax, its fp16 copy, the input of the mask's max
_LAYERS, _WIDTH, _HEADS = 32, 4096, 32
_TRAINED = 16  # bytes per parameter: fp32 weight, gradient, two moments


@dataclass(frozen=True)
class Item:
    """One line of the account. how: the formula in words."""

    name: str
    bytes: int
    how: str


def reference_account(kind: str, parts: Sequence[PartBytes], config: Any, row: Row) -> list[Item]:
    """Where the memory of ``kind`` goes for a padded micro-batch ``row``. config: the language model's."""
    language = sum(part.count for part in parts if part.name == "llama_model")
    trained = sum(part.count for part in parts if part.trains)
    vision = sum(part.count for part in parts if part.name in ("visual_encoder", "ln_vision"))
    others = sum(part.count for part in parts if not part.trains) - language - vision
    length = row.shape.positions
    layers, width, heads = (
        int(getattr(config, name)) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    linear = _PER_POSITION * (layers * width) / (_LAYERS * _WIDTH)
    square = _PER_PAIR * (layers * heads) / (_LAYERS * _HEADS)
    rotary = layers * 2 * int(config.max_position_embeddings) * (width // heads) * 4
    size = 4 if kind == "fork" else 2
    items = [
        Item("language model", language * size, f"{language / 1e9:.2f}e9 parameters x {size} bytes"),
        Item("vision tower", vision * 2, f"{vision / 1e9:.2f}e9 x 2 bytes"),
        Item("Q-Former", others * 4, f"{others / 1e6:.0f}e6 x 4 bytes"),
        Item("what trains", trained * _TRAINED, f"{trained / 1e6:.1f}e6 x 16 bytes: weight, gradient, two moments"),
        Item("rotary caches", rotary, f"{layers} layers, each its own"),
        Item(
            "activations", int(row.samples * (linear * length + square * length**2)),
            f"{row.samples} x ({linear / 1e6:.2f} MB x {length} + {square / 1e3:.1f} kB x {length}^2 positions)",
        ),
    ]  # fmt: skip
    if kind == "fork":
        logits = row.samples * length * int(config.vocab_size) * 4
        items += [
            Item("pinned fp16 copies", language * 2, "one of every fp32 weight, held by autograd until backward"),
            Item("outputs kept", logits, "fp32 logits of every position, held through backward"),
        ]
    items.append(Item("CUDA context", CONTEXT, "assumed"))
    return [item for item in items if item.bytes]


def explanation(kind: str) -> str:
    """Why the account looks as it does."""
    if kind == "upstream":
        return (
            "upstream: fp16 base left as it is (peft 0.2), eager attention, so activations grow with the square of the "
            "length; nothing is recomputed."
        )
    return (
        "fork: its peft 0.9 casts every frozen fp16 weight to fp32 when it prepares the model for int8 training, even "
        "without int8. The weights double, and because autocast keeps no copy of weights that do not train, the fp16 "
        "copy made for each layer stays pinned by autograd until the backward pass has used it. Emptying the cache or "
        "splitting blocks cannot give this back."
    )
