"""The nouns every room shares: a turn, a sample, an encoded sample, a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not supervised (PyTorch's cross-entropy convention)."""
IMAGE_TOKEN = -200
"""Stands in ``input_ids`` once per image feature; never a row of an embedding table."""
IMAGE_TAG = "<ImageHere>"
"""Stands in text once per image."""
IMAGE_PROMPT = f"<Img>{IMAGE_TAG}</Img>"
"""How an image is written inside an instruction (MiniGPT-4 format)."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer. ``prompt`` holds IMAGE_TAG once per image; ``answer`` has no end symbol."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read and was passed over."""

    dataset: str
    index: int
    message: str


@dataclass(frozen=True)
class Sample:
    """One training example. ``images``: one tensor per IMAGE_TAG over all turns, [3, S, S] float32, normalised,
    or its frozen features [P, C'].

    ``passed_over``: broken records in whose place this one stands.
    """

    turns: tuple[Turn, ...]
    images: tuple[Tensor, ...]
    sample_id: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    passed_over: tuple[BadRecord, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One sample as ids. ``ids`` and ``labels`` have the same length; the first label is IGNORE_INDEX.

    ``num_images``: how many images have positions in ``ids`` (a cut may drop later ones).
    ``is_truncated``: the answer part lost its tail to ``max_txt_len``, and with it the end symbol.
    ``is_prompt_cut``: the first prompt lost its tail to ``max_context_len``.
    """

    ids: list[int]
    labels: list[int]
    num_images: int
    is_truncated: bool = False
    is_prompt_cut: bool = False


@dataclass
class Batch:
    """What a model reads: R rows (1 when packed, B when padded) of T positions, N images.

    input_ids     [R, T] long; IMAGE_TOKEN stands P times per image, images are consumed in order.
    position_ids  [R, T] long; restarts at 0 for every sample; the padded tail is 0.
    labels        [R, T] long; IGNORE_INDEX except answer tokens; the first token of a sample is IGNORE_INDEX.
    images        [N, 3, S, S] float32, or frozen features [N, P, C']; N may be 0.
    image_order   [M] long: which of ``images`` stands at each of M places; None: every one once, in order.
    lengths       per sample, in order of appearance.
    passed_over   broken records that others stand in for.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    images: Tensor
    lengths: tuple[int, ...]
    num_target_tokens: int
    sample_ids: tuple[str, ...] = ()
    num_image_positions: int = -1
    passed_over: tuple[BadRecord, ...] = ()
    image_order: Tensor | None = None

    def __post_init__(self) -> None:
        # Counted once, on the CPU, so that the model can check it without a device synchronisation.
        if self.num_image_positions < 0:
            self.num_image_positions = int((self.input_ids == IMAGE_TOKEN).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; copies from pinned memory do not block."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            labels=move(self.labels),
            images=move(self.images),
            image_order=None if self.image_order is None else move(self.image_order),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by ``DataLoader(pin_memory=True)``)."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            images=self.images.pin_memory(),
            image_order=None if self.image_order is None else self.image_order.pin_memory(),
        )
