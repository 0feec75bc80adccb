"""Bytes of live tensors, counted operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[Any, Any, Any], Any]
"""(operation, arguments, named arguments) -> result: how an operation is run."""
Workspace = Callable[[Any, Any, Any], int]
"""(operation, arguments, result) -> bytes its kernel allocates and frees inside itself."""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts every storage an operation returns until it is freed; ``peak`` is the most that was alive at once.

    Counted: results of forward and backward operations, inside autograd functions and recomputed layers too, for as
    long as anything (a variable, the graph, a ``.grad``) holds them. A view or an in-place result is its storage, once.
    Not counted: what existed before the mode was entered (weights, data); what one operation allocates and frees inside
    itself, unless ``workspace`` tells it; what the allocator wastes beyond ``block``, to whose multiples sizes are
    rounded; what ``run`` does besides the operation. So the figure is a lower bound of what a step needs.
    """

    def __init__(self, block: int = 1, workspace: Workspace | None = None, run: Run | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._block, self._workspace, self._run = block, workspace, run
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count new storages among its results."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # modes for Python functions have no business below an operation
            given = {storage_key(tensor) for tensor in tensors_in(args, kwargs)}
            result = func(*args, **kwargs) if self._run is None else self._run(func, args, kwargs)
            for tensor in tensors_in((result,)):
                if storage_key(tensor) not in given:
                    self.count(tensor)
            if self._workspace is not None:
                self.peak = max(self.peak, self.alive + self._workspace(func, args, result))
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed; nothing happens when it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or storage.nbytes() == 0:
            return
        self._known.add(key)
        size = -(-storage.nbytes() // self._block) * self._block
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def tensors_in(values: Iterable[Any], named: Mapping[str, Any] = MappingProxyType({})) -> list[torch.Tensor]:
    """The tensors among arguments or results of an operation; they may stand in lists, but no deeper."""
    found = []
    for value in (*values, *named.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def storage_key(tensor: torch.Tensor) -> int:
    """The same for all views of one storage."""
    return int(tensor.untyped_storage()._cdata)
