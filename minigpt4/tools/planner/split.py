"""``run.parallel: fsdp`` in numbers: who holds which part, and what is gathered while a row runs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from minigpt4.common.schema import RunConfig
from minigpt4.common.sharding import gathered_dtype
from minigpt4.models.base_model import BaseModel
from minigpt4.models.split_model import left_whole, units

_META = torch.device("meta")
_FLOAT32 = 4


@dataclass(frozen=True)
class Ranks:
    """GPUs of a run. per_node: of one node; 0: all of them."""

    count: int = 1
    per_node: int = 0

    @property
    def on_a_node(self) -> int:
        """GPUs whose processes share the memory of one host."""
        return self.per_node or self.count

    def shards(self, run: RunConfig) -> int:
        """Parts that the model is split into; 1: every rank holds all of it."""
        if run.parallel != "fsdp":
            return 1
        return self.on_a_node if run.shard_over == "node" else self.count


def shard_size(shape: Sequence[int], shards: int) -> int:
    """Elements that each of ``shards`` ranks holds: rows are dealt out in equal numbers, the last ones are padded."""
    return math.ceil(shape[0] / shards) * math.prod(shape[1:]) if shape else 1


@dataclass(frozen=True, eq=False)
class Unit:
    """What is gathered at once. dtype: on the way; None = every weight in its own."""

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    dtype: torch.dtype | None
    shards: int

    @property
    def gathered(self) -> int:
        """Bytes of the whole unit."""
        size = 0 if self.dtype is None else self.dtype.itemsize
        return sum(shard_size(p.shape, self.shards) * self.shards * (size or p.element_size()) for p in self.parameters)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters with gradients."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    @property
    def reduced(self) -> int:
        """Bytes of one rank's part of the gradients."""
        return sum(_FLOAT32 * shard_size(parameter.shape, self.shards) for parameter in self.trained)


def find_units(model: BaseModel, shards: int) -> list[Unit]:
    """The root, then every unit in the order of the forward. A vision part that was freed belongs to none."""
    taken = {id(parameter) for parameter in left_whole(model)}
    found = []
    for module in units(model):
        own = tuple(parameter for parameter in module.parameters() if id(parameter) not in taken)
        taken |= set(map(id, own))
        found.append(Unit(module, own, gathered_dtype(module, model.dtype), shards))
    rest = tuple(parameter for parameter in model.parameters() if id(parameter) not in taken)
    return [Unit(model, rest, None, shards), *found]


class _Ending(torch.autograd.Function):
    """Calls ``action`` when the gradient of a unit's input is there: the backward of the unit is over."""

    @staticmethod
    def forward(ctx: Any, action: Callable[[], None], tensor: Tensor) -> Tensor:
        """The tensor as it is."""
        ctx.action = action
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        """Its gradient as it is."""
        ctx.action()
        return None, grad_outputs[0]


class Gathering:
    """Allocates on the meta device what FSDP2 allocates around forward and backward of a window's last row.

    Forward: a unit arrives as one flat buffer, which stays until the next one has arrived, and is unpacked into its
    weights, which go when it has run. Backward: the unit before is on its way while one runs; gradients of a unit are
    copied into a float32 buffer, which stays until the next unit's, and leave this rank's part. The root's weights stay
    throughout, its gradients to the end. (torch.distributed.fsdp, FSDPParamGroup.)
    """

    def __init__(self, model: BaseModel, shards: int) -> None:
        self._root, *self._units = find_units(model, shards)
        self._flat: dict[Unit, Tensor] = {}
        self._whole: dict[Unit, Tensor] = {}
        self._order: list[Unit] = []
        self._begun: set[Unit] = set()
        self._done: set[Unit] = set()
        self._reduced: list[Tensor] = []
        self._accumulated: dict[Unit, list[Tensor]] = {}
        self._arrived: Tensor | None = None  # the flat buffer of the unit that the forward is in
        self._sent: Tensor | None = None  # the buffer of gradients that is being reduced
        self._in_backward = False

    @contextlib.contextmanager
    def travelling(self) -> Iterator[None]:
        """Weights that are gathered in another dtype are of that dtype meanwhile."""
        masters = {p: p.data for unit in self._units if unit.dtype is not None for p in unit.parameters}
        for unit in self._units:
            for parameter in unit.parameters if unit.dtype is not None else ():
                parameter.data = parameter.data.to(unit.dtype)
        try:
            yield
        finally:
            for parameter, data in masters.items():
                parameter.grad, parameter.data = None, data

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Forward and backward inside."""
        everything = [self._root, *self._units]
        hooks = []
        for unit in everything:
            hooks.append(unit.module.register_forward_pre_hook(self._before(unit), with_kwargs=True, prepend=True))
            hooks.append(unit.module.register_forward_hook(self._after(unit)))
        try:
            yield
            for unit in everything:  # where no gradient came back to an input
                self._end(unit)
        finally:
            for hook in hooks:
                hook.remove()

    def accumulate(self) -> None:
        """Earlier rows of the window have left whole float32 gradients."""
        for unit in (self._root, *self._units):
            gradients = [torch.empty(p.shape, dtype=torch.float32, device=_META) for p in unit.trained]
            if unit.dtype is None:  # this row's are added in place
                for parameter, gradient in zip(unit.trained, gradients, strict=True):
                    parameter.grad = gradient
            else:
                self._accumulated[unit] = gradients

    def moments(self) -> list[Tensor]:
        """AdamW's two, of this rank's part."""
        return [_bytes(2 * unit.reduced) for unit in (self._root, *self._units)]

    def _before(self, unit: Unit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._in_backward:  # recomputed: it is whole already
                return None
            self._flat[unit] = _bytes(unit.gathered)
            self._arrived = None
            self._unpack(unit)
            if unit is self._root or not torch.is_grad_enabled():
                return None
            return tree_map_only(Tensor, lambda tensor: self._ending(unit, tensor), (args, kwargs))

        return hook

    def _ending(self, unit: Unit, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        ending: Tensor = _Ending.apply(lambda: self._end(unit), tensor)
        return ending

    def _unpack(self, unit: Unit) -> None:
        self._whole[unit] = _bytes(unit.gathered)
        flat = self._flat.pop(unit)
        if not self._in_backward:
            self._arrived = flat

    def _after(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._in_backward:
                return
            self._order.append(unit)
            if unit is self._root:
                self._arrived = None
            else:
                del self._whole[unit]
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._begin(unit))  # type: ignore[no-untyped-call]

        return hook

    def _begin(self, unit: Unit) -> None:
        """The backward of a unit starts: it is whole, and the one before it is sent for."""
        self._in_backward = True
        if unit in self._begun:  # a hook of another output
            return
        self._begun.add(unit)
        if unit not in self._whole:
            self._flat.setdefault(unit, _bytes(unit.gathered))
            self._unpack(unit)
        place = self._order.index(unit)
        before = self._order[place - 1] if place else None
        if before is not None and before not in self._whole:
            self._flat[before] = _bytes(before.gathered)

    def _end(self, unit: Unit) -> None:
        """The backward of a unit is over: its weights go, its gradients become this rank's part."""
        if unit in self._done:
            return
        self._done.add(unit)
        self._whole.pop(unit, None)
        self._sent = None
        if not unit.trained:
            return
        self._sent = _bytes(unit.reduced * unit.shards)
        for parameter in unit.trained:
            parameter.grad = None
        self._accumulated.pop(unit, None)
        self._reduced.append(_bytes(unit.reduced))


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=_META)


def host_bytes(model: BaseModel, ranks: Ranks) -> int:
    """Memory of one host while its ranks start: each builds the whole model, its tower in float32."""
    tower = {id(parameter) for parameter in model.visual_encoder.parameters()}
    one = sum(_FLOAT32 * p.numel() if id(p) in tower else p.nbytes for p in model.parameters())
    return ranks.on_a_node * one
