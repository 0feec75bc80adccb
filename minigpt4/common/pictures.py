"""Pictures that are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from minigpt4.common.types import Pixels

if TYPE_CHECKING:
    from torch import Tensor

Picture = TypeVar("Picture", bound="Tensor | Pixels")
_LOOKED_AT = 32
"""Values of a picture that tell most pictures apart."""


def distinct(images: Sequence[Picture]) -> tuple[list[Picture], list[int]]:
    """Every picture once, and which of these stands at each place. Equal means equal in every value."""
    import torch

    kept: list[Picture] = []
    order: list[int] = []
    alike: dict[Any, list[int]] = {}  # a few values find what is worth a whole comparison
    for image in images:
        values, norm = _values(image), (image.mean, image.std) if isinstance(image, Pixels) else None
        flat = values.reshape(-1)
        candidates = alike.setdefault((norm, *flat[:: flat.numel() // _LOOKED_AT + 1].tolist()), [])
        number = next((number for number in candidates if torch.equal(_values(kept[number]), values)), len(kept))
        if number == len(kept):
            candidates.append(number)
            kept.append(image)
        order.append(number)
    return kept, order


def _values(picture: Tensor | Pixels) -> Tensor:
    return picture.values if isinstance(picture, Pixels) else picture
