"""The nouns every room shares: a turn, a sample, an encoded sample, a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
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
class Pixels:
    """A picture as bytes, [3, S, S] uint8: a quarter of the floats to move and to keep.

    ``mean`` and ``std``, per channel and in units of full scale, are of the normalisation that the device does.
    """

    values: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def norm(self) -> Tensor:
        """Mean and standard deviation, [2, 3, 1, 1] float32."""
        import torch

        return torch.tensor([self.mean, self.std]).view(2, -1, 1, 1)

    def normalised(self) -> Tensor:
        """[3, S, S] float32."""
        return normalise(self.values, self.norm())


def normalise(values: Tensor, norm: Tensor) -> Tensor:
    """uint8 [..., 3, S, S] -> ``(values / 255 - mean) / std``, each operation in float32 and in this order.

    norm: mean and standard deviation, [2, 3, 1, 1]. The bits are those of torchvision's ToTensor and Normalize.
    """
    return values.float().div_(255).sub_(norm[0]).div_(norm[1])


def as_floats(picture: Tensor | Pixels) -> Tensor:
    """What a model reads: normalised pixels [3, S, S], or features as they are."""
    return picture.normalised() if isinstance(picture, Pixels) else picture


@dataclass(frozen=True)
class Sample:
    """One training example. ``images``: one per IMAGE_TAG over all turns: bytes, normalised floats [3, S, S],
    or frozen features [P, C'].

    ``passed_over``: broken records in whose place this one stands.
    """

    turns: tuple[Turn, ...]
    images: tuple[Tensor | Pixels, ...]
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
    images        [N, 3, S, S] float32, or frozen features [N, P, C']; N may be 0. With ``image_norm`` uint8.
    image_norm    [2, 3, 1, 1]: mean and standard deviation of a normalisation that is still to be done.
    image_order   [M] long: which of ``images`` stands at each of M places; None: every one once, in order.
    lengths       per sample, in order of appearance.
    passed_over   broken records that others stand in for.

    Two lists of positions, counted through all rows, are made with the batch: a GPU that had to look for them would
    let the host wait for how many it finds.
    supervised    [n] long; the positions whose next one has a label.
    image_places  [M * P] long; the positions of IMAGE_TOKEN.
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
    image_norm: Tensor | None = None
    supervised: Tensor = field(init=False)
    image_places: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = (self.labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        self.supervised = rows * self.labels.shape[1] + columns
        self.image_places = (self.input_ids.flatten() == IMAGE_TOKEN).nonzero().flatten()
        if self.num_image_positions < 0:
            self.num_image_positions = len(self.image_places)

    def without_targets(self) -> Batch:
        """The same rows with nothing to learn: a forward and backward that add nothing."""
        return replace(self, labels=self.labels.new_full(self.labels.shape, IGNORE_INDEX), num_target_tokens=0)

    def copied(self, device: torch.device) -> Batch:
        """The same batch on ``device``, pictures still as bytes; copies from pinned memory do not block."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def to(self, device: torch.device) -> Batch:
        """What a model reads, on ``device``; bytes are normalised there."""
        batch = self.copied(device)
        if batch.image_norm is not None:
            batch.images, batch.image_norm = normalise(batch.images, batch.image_norm), None
        return batch

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch."""
        found = [getattr(self, name) for name in _TENSORS]
        return [tensor for tensor in found if tensor is not None]

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by ``DataLoader(pin_memory=True)``)."""
        return self._with(lambda tensor: tensor.pin_memory())

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with other tensors; nothing is looked for again."""
        other = copy(self)
        for name in _TENSORS:
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else change(tensor))
        return other


_TENSORS = (
    "input_ids", "position_ids", "labels", "images", "image_order", "image_norm", "supervised", "image_places"
)  # fmt: skip
