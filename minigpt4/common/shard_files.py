"""Optimiser state that is split over ranks, on disk: every rank writes its part, any number of ranks reads it back.

torch.distributed.checkpoint in its safetensors form, one file per rank. Its own form keeps a pickle, which could run
code when it is read. A tensor is called ``<parameter>/<moment>``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import CheckpointError, RunError

State = Mapping[str, Mapping[str, Tensor]]
"""Of an optimiser: parameter -> moment -> tensor."""


def write_shards(folder: Path, state: State, group: Any) -> Future[Any]:
    """Copies this rank's part to host memory, and returns while a thread writes it below ``folder``.

    group: of all ranks, for that thread alone. The future ends when every rank has written; it raises what one could
    not.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    writer: Any = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    future: Any = async_save(_flat(state), storage_writer=writer, process_group=group)
    return future  # type: ignore[no-any-return]


def finished(future: Future[Any]) -> None:
    """Waits for what ``write_shards`` began. Raises OSError where the system refused a rank, else RunError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        future.result()
    except CheckpointException as error:
        for rank, (cause, _) in sorted(error.failures.items()):
            if isinstance(cause, OSError):
                raise cause from error
            raise RunError(f"rank {rank} could not write its part of the checkpoint: {cause}") from error
        raise


def read_shards(folder: Path, parameters: Mapping[str, nn.Parameter] | None = None) -> dict[str, dict[str, Tensor]]:
    """The state, its moments split and placed as ``parameters`` are; without any, whole on the CPU.

    Each rank reads what it needs and asks nobody. A moment of another shape than its parameter comes whole, too.
    Raises CheckpointError for what is not readable.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _naming(folder):
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        state: dict[str, dict[str, Tensor]] = {}
        for key, entry in stored.items():
            name, moment = key.rsplit("/", 1)
            parameter = (parameters or {}).get(name)
            size, dtype = entry.size, entry.properties.dtype  # type: ignore[union-attr]
            if parameter is not None and parameter.shape == size:
                state.setdefault(name, {})[moment] = torch.empty_like(parameter.detach(), dtype=dtype)
            else:
                state.setdefault(name, {})[moment] = torch.empty(size, dtype=dtype)
        load({**_flat(state)}, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return {name: {key: _as_counted(key, value) for key, value in moments.items()} for name, moments in state.items()}


def _flat(state: State) -> dict[str, Any]:
    """A count of steps gets one dimension: slices of none cannot be read from a safetensors file."""
    return {
        f"{name}/{moment}": value.reshape(1) if value.dim() == 0 else value
        for name, moments in state.items()
        for moment, value in moments.items()
    }


def _as_counted(moment: str, value: Tensor) -> Tensor:
    return value.reshape(()) if moment == "step" else value


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # torch says that one process reads alone, which is what is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except (SafetensorError, CheckpointException, OSError) as error:
        raise CheckpointError(f"{folder}: not readable ({str(error).strip().splitlines()[0]})") from error
