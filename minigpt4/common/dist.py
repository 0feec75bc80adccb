"""Ranks and devices (torchrun and SLURM; gloo on CPU, nccl on GPU).

This file alone talks to torch.distributed; ``sharding`` and ``shard_files`` split and store tensors by its parts.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.schema import RunConfig

ROLL_CALL_S = 5.0
"""After a failure: how long a rank listens for the others, to name those that are silent."""
_POLL_S = 0.05
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL")
"""In the text of what torch raises when another rank is gone or late; gloo raises a bare RuntimeError."""


@dataclass(frozen=True)
class DistContext:
    """This process among its peers. With ``world_size`` 1 every method works without a process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout_s: float = 0.0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files."""
        return self.rank == 0

    def sum(self, value: int | float | Sequence[int] | Tensor) -> Tensor:
        """Sum over ranks, on ``device`` (int64 for integers, float64 for floats); the host does not wait."""
        if isinstance(value, Tensor):
            total = value.detach().to(self.device, copy=True)
        elif isinstance(value, int | float):
            # a fill kernel: copying a host scalar to a GPU would wait for the queue
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            total = torch.full((), value, dtype=dtype, device=self.device)
        else:
            total = torch.stack([torch.full((), item, dtype=torch.int64, device=self.device) for item in value])
        if self.world_size > 1:
            torch_dist.all_reduce(total)
        return total

    def largest(self, value: int) -> int:
        """The largest ``value`` of all ranks. The host waits for the other hosts, not for what a GPU has queued."""
        if self.world_size == 1:
            return value
        most = torch.full((), value, dtype=torch.int64)
        torch_dist.all_reduce(most, op=torch_dist.ReduceOp.MAX, group=self._host_group)
        return int(most)

    @cached_property
    def _host_group(self) -> Any:
        """Ranks on the CPU, for the thread that trains: two threads must not share a group. None = the default one."""
        return None if self.device.type == "cpu" else self.background_group()

    def background_group(self) -> Any:
        """A second group of all ranks, for exchanges from a thread beside training; on the CPU whatever the device."""
        return torch_dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value`` on every rank, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            torch_dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients averaged over ranks; the same object when there is one rank.

        Every trainable parameter takes part in every forward (a text-only batch adds 0 * projection), so unused
        parameters are not searched for; frozen buffers are equal from the start and are not sent again. What is on the
        meta device has nothing to be sent.
        """
        if self.world_size == 1:
            return model
        absent = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, absent)
        with warnings.catch_warnings():  # newer torch renames broadcast_buffers, older torch knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                find_unused_parameters=False,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Around a run: RunError that names the silent ranks when one is gone or later than ``timeout_s``."""
        try:
            yield
        except RuntimeError as error:
            is_lost = isinstance(error, torch_dist.DistError) or any(mark in str(error) for mark in _LOST)
            if self.world_size == 1 or not is_lost:
                raise
            text = str(error).strip().splitlines()[0]
            raise RunError(
                f"rank {self.rank} lost contact: {self._roll_call()}. A rank was ended, its machine or network failed, "
                f"or it took longer than run.dist_timeout = {self.timeout_s:g} s; its own output says more. "
                f"Go on from the last checkpoint with --resume auto ({text})"
            ) from error

    def _roll_call(self) -> str:
        """Which ranks have not come here too, shortly after this one."""
        keys = {rank: f"minigpt4/lost_contact/{rank}" for rank in range(self.world_size)}
        silent = [rank for rank in keys if rank != self.rank]
        end = time.monotonic() + min(ROLL_CALL_S, self.timeout_s)
        try:
            store = torch_dist.distributed_c10d._get_default_store()
            store.set(keys[self.rank], "1")
            while silent and time.monotonic() < end:
                time.sleep(_POLL_S)
                silent = [rank for rank in silent if not store.check([keys[rank]])]
        except RuntimeError:
            return "the meeting point of the ranks, on rank 0's machine, does not answer"
        if not silent:
            return "all ranks are alive, but a message between them was lost"
        return f"no answer from {_named(silent)}"

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def sync_gradients(model: Any, enabled: bool, is_sharded: bool = False) -> contextlib.AbstractContextManager[None]:
    """Forward and backward inside: gradients are reduced over ranks only when ``enabled``.

    is_sharded: ``sharding.shard`` has split ``model``.
    """
    if is_sharded:
        model.set_requires_gradient_sync(enabled)
        return contextlib.nullcontext()
    if enabled or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def init(run: RunConfig) -> DistContext:
    """Find this process's place (torchrun or srun), join the group. Raises ConfigError for an absent device."""
    rank, world_size, local_rank = _place(os.environ)
    if world_size > 1 and not run.distributed:
        raise ConfigError(f"run.distributed is False, but {world_size} processes were started; set it to True")
    device = _device(run.device, local_rank)
    if world_size > 1:
        try:
            _join(run, rank, world_size, device)
        except RuntimeError as error:
            raise RunError(
                f"the {world_size} ranks did not meet at {_meeting_place(run.dist_url)} within {run.dist_timeout:g} s "
                f"(run.dist_timeout): {str(error).splitlines()[0]}"
            ) from error
    return DistContext(rank, world_size, local_rank, device, run.dist_timeout)


def _join(run: RunConfig, rank: int, world_size: int, device: torch.device) -> None:
    timeout = timedelta(seconds=run.dist_timeout)
    store, _, _ = next(rendezvous(run.dist_url, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    token = _agree_on_token(PrefixStore("minigpt4", store), rank, world_size, run.dist_timeout)
    torch_dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(token, store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def _agree_on_token(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """The same new word on every rank, drawn by rank 0.

    torchrun's store outlives a restart: what the dead ranks wrote in it (their addresses) would be taken for that of
    the living. So every process draws a word, rank 0 answers each word it finds, and waits for replies to its own.
    Raises RuntimeError that names the ranks that do not come.
    """
    mine = uuid4().hex
    if rank > 0:
        store.set(f"join/{rank}", mine)
        token: str = store.get(f"answer/{mine}").decode()  # waits
        store.set(f"reply/{token}/{rank}", "1")
        return token
    absent, end = list(range(1, world_size)), time.monotonic() + timeout_s
    while absent:
        for other in absent:
            if store.check([f"join/{other}"]):
                store.set(f"answer/{store.get(f'join/{other}').decode()}", mine)
        absent = [other for other in absent if not store.check([f"reply/{mine}/{other}"])]
        if absent and time.monotonic() > end:
            raise RuntimeError(f"no sign of {_named(absent)}")
        time.sleep(_POLL_S if absent else 0)
    return mine


def _named(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _meeting_place(url: str) -> str:
    """Where ranks meet, for people."""
    if url != "env://":
        return url
    return f"MASTER_ADDR:MASTER_PORT = {os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def single(device: str = "auto") -> DistContext:
    """One process without peers, whatever the environment says (tools, chat, tests)."""
    return DistContext(0, 1, 0, _device(device, 0))


def _place(env: Mapping[str, str]) -> tuple[int, int, int]:
    """rank, world size, local rank from torchrun's variables, else from srun's, else one process."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    # srun sets the step's size; a batch script that starts python itself has SLURM_PROCID but is one process
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR") or _first_node(env))
        os.environ.setdefault("MASTER_PORT", str(15000 + int(env.get("SLURM_JOB_ID", "0")) % 15000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", "0"))
    return 0, 1, 0


def _first_node(env: Mapping[str, str]) -> str:
    """The first host of a SLURM list: 'a[03-07,09],b1' -> 'a03'."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    match = re.match(r"([^\[,]+)(?:\[([^,\-\]]+))?", nodes)
    return f"{match[1]}{match[2] or ''}" if match else nodes


def _device(name: str, local_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name.split(":")[0] not in ("cuda", "cpu"):
        raise ConfigError(f"run.device must be auto, cuda or cpu; got '{name}'")
    if name == "cpu":
        return torch.device("cpu")
    if not has_cuda:
        raise ConfigError(f"run.device is '{name}', but no CUDA device is usable here; set run.device to cpu or auto")
    if name == "cuda":
        # a launcher that gives each process one visible GPU calls it 0 everywhere
        index = 0 if torch.cuda.device_count() == 1 else local_rank
        name = f"cuda:{index}"
    device = torch.device(name)
    if device.index is None or device.index >= torch.cuda.device_count():
        raise ConfigError(f"device '{name}' does not exist; {torch.cuda.device_count()} GPUs are visible")
    torch.cuda.set_device(device)
    return device
