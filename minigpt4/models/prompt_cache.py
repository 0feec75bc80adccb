"""Keys and values of one conversation, kept from turn to turn so that only new positions are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from minigpt4.common.types import IMAGE_TOKEN

_CHUNK = 256
_CROPPABLE = {"full_attention", "sliding_attention"}


class PromptCache:
    """What one model has computed for the positions of one conversation. The caller keeps it; the weights must not
    change meanwhile.

    ``ids`` are the positions that are held. A prompt that starts with the same ids, about the same pictures, is
    computed from its first other position on.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._images = torch.zeros(0)
        self._held: Cache | None = None

    def take(self, ids: Sequence[int], images: Tensor, num_image_tokens: int) -> Cache:
        """Keys and values of the positions shared with the prompt ``ids`` about ``images`` [N, ...].

        At least the last position stays to be computed. Until ``put_back`` this object holds nothing: an answer that
        breaks off leaves no half-written state.
        """
        held, shared = self._held, self._shared(ids, images, num_image_tokens)
        surplus = len(self.ids) - shared
        self.ids, self._held = [], None
        if held is None or shared == 0:
            return growing_cache()
        if surplus:
            held.crop(-surplus)
        return held

    def put_back(self, held: Cache, ids: Sequence[int], images: Tensor) -> None:
        """Keep ``held``; ``ids``: prompt and answer, of which it holds the first ones (the last id was never fed)."""
        self._held, self._images = held, images
        self.ids = list(ids[: held.get_seq_length()])

    def _shared(self, ids: Sequence[int], images: Tensor, num_image_tokens: int) -> int:
        same = 0
        while same < min(len(self._images), len(images)) and torch.equal(self._images[same], images[same]):
            same += 1
        image_positions = same * num_image_tokens
        for position, (mine, theirs) in enumerate(zip(self.ids, ids[:-1], strict=False)):
            image_positions -= mine == IMAGE_TOKEN
            if mine != theirs or image_positions < 0:
                return position
        return min(len(self.ids), len(ids) - 1)


def growing_cache() -> Cache:
    """Holds nothing yet."""
    return Cache(layer_class_to_replicate=_GrowingLayer)


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Writes new positions into spare room; transformers' own layer copies every held position for every new one."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states [B, H, new, d] -> all keys and values, [B, H, T, d]."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys = self._key_room = key_states[..., :0, :]
            self.values = self._value_room = value_states[..., :0, :]
        held = self.get_seq_length()  # less than the room was filled to after a crop
        total = held + key_states.shape[-2]
        if self._key_room.shape[-2] < total:
            self._key_room = _with_room(self._key_room[..., :held, :], total)
            self._value_room = _with_room(self._value_room[..., :held, :], total)
        self._key_room[..., held:total, :] = key_states
        self._value_room[..., held:total, :] = value_states
        self.keys, self.values = self._key_room[..., :total, :], self._value_room[..., :total, :]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """[B, H, T, d] -> [repeats * B, H, T, d]."""
        assert self.keys is not None and self.values is not None
        self.keys = self._key_room = self.keys.repeat_interleave(repeats, dim=0)
        self.values = self._value_room = self.values.repeat_interleave(repeats, dim=0)


def _with_room(held: Tensor, total: int) -> Tensor:
    """A copy of ``held`` [B, H, T, d] with room for at least ``total`` positions."""
    room = held.new_empty(*held.shape[:-2], (total // _CHUNK + 1) * _CHUNK, held.shape[-1])
    room[..., : held.shape[-2], :] = held
    return room


def keeps_positions(llm: Any) -> bool:
    """Whether earlier positions of ``llm`` can be kept and cut at any place.

    False for models with a running state (Mamba and the like) and for rotary embeddings that change with the length.
    """
    config = llm.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    layers = set(getattr(config, "layer_types", None) or _CROPPABLE)
    return layers <= _CROPPABLE and not kinds & {"dynamic", "longrope"} and not llm._is_stateful
