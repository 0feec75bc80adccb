"""``run.parallel: fsdp``: weights, gradients and moments split over ranks by torch's ``fully_shard`` (FSDP2).

A unit is gathered where its forward or backward runs, and let go again. The root unit, all that is in no other, stays
whole from the start of a row to the end of its backward: whoever reads those weights from outside (the cross-entropy
over the head's, the embedding of ids) finds plain tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minigpt4.common.dist import DistContext
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import RunConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy


def is_sharded_run(run: RunConfig, dist: DistContext) -> bool:
    """Whether this run splits its model: one rank alone has nothing to split."""
    return run.parallel == "fsdp" and dist.world_size > 1


def shard(
    model: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, dtype: torch.dtype, left_out: Iterable[nn.Parameter]
) -> None:
    """Split ``model`` in place: each of ``units`` moves to the device of ``mesh`` and is split, then all the rest.

    dtype: of the arithmetic. left_out: parameters that stay as they are, where they are.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    ignored = set(left_out)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=_policy(unit, dtype), ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=_policy(None, dtype), ignored_params=ignored)
    register_fsdp_forward_method(model, "generate")


def _policy(unit: nn.Module | None, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Gradients are reduced in float32, inputs stay as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(
        param_dtype=gathered_dtype(unit, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def gathered_dtype(unit: nn.Module | None, dtype: torch.dtype) -> torch.dtype | None:
    """In which a unit (None: the root) goes over the wire; None: every weight in its own.

    dtype: of the arithmetic. Autocast would bring the float32 masters of a unit that trains as a whole to it anyway.
    """
    trains = unit is not None and all(parameter.requires_grad for parameter in unit.parameters())
    return dtype if trains and dtype != torch.float32 else None


def make_mesh(dist: DistContext, over: str) -> DeviceMesh:
    """All ranks in one line; with ``over`` node copies over nodes, each split inside one.

    Raises ConfigError when the nodes have different numbers of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = ranks_per_node(os.environ, dist.world_size) if over == "node" else dist.world_size
    if size == dist.world_size:
        return init_device_mesh(dist.device.type, (size,), mesh_dim_names=("shard",))
    shape = (dist.world_size // size, size)
    return init_device_mesh(dist.device.type, shape, mesh_dim_names=("copy", "shard"))


def ranks_per_node(env: Mapping[str, str], world_size: int) -> int:
    """From torchrun's or srun's variables. Raises ConfigError when it is not said, or differs between nodes."""
    # '8(x2)' is srun's word for two nodes of 8; '8,4' are unequal ones
    text = env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", "")
    number = text.partition("(")[0]
    if not number.isdecimal() or "," in text:
        raise ConfigError(
            f"run.shard_over node: the ranks of a node are unknown or differ (LOCAL_WORLD_SIZE = '{text}'); "
            "start with torchrun, or use shard_over: world"
        )
    if world_size % int(number):
        raise ConfigError(f"run.shard_over node: {world_size} ranks do not divide into nodes of {number}; use world")
    return int(number)


def let_go(model: Any) -> None:
    """After forwards of a split ``model`` without a backward, which would do it: its root unit is split again."""
    model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A split tensor gathered, which every rank must ask for; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The whole ``tensor``, the same on every rank, split as ``parameter`` is; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
        return tensor
    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
