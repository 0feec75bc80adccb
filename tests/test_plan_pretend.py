"""The meta device pretending to be a GPU: the same tensors, in the same dtypes, kept for the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from minigpt4.common.registry import registry
from minigpt4.models.generation import GenerationMixin
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner.pretend import GpuCalls, MetaOperations, _attend
from tests.golden_cases import build_config, load_case

BF16 = torch.bfloat16
META, CUDA = torch.device("meta"), torch.device("cuda")
Kept = Counter[tuple[tuple[int, ...], torch.dtype]]


class FusedAttention(TorchFunctionMode):
    """Fake CUDA tensors without a driver know the unfused kernel only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(True, *args, **kwargs)
        return func(*args, **kwargs)


def skeleton(name: str, **changes: Any) -> GenerationMixin:
    cfg = replace(build_config(load_case(name)), **changes)
    model: GenerationMixin = registry.get("model", cfg.arch).from_config(cfg, META, BF16).train()
    return model


def move_to_fake_cuda(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                moved = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """``torch.autocast`` refuses on a machine without a GPU; the dispatcher does not."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", BF16)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def run_forward(model: GenerationMixin, device: torch.device, memory: LiveMemory) -> tuple[Kept, int]:
    """What autograd keeps of images, projection and decoder; bytes alive while it is kept."""
    kept: Kept = Counter()

    def note(tensor: Tensor) -> Tensor:
        kept[tuple(tensor.shape), tensor.dtype] += 1
        return tensor

    size = model.cfg.image_size
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model.encode_images(torch.empty(2, 3, size, size, device=device))
        hidden = model.hidden_states(features.to(BF16), torch.zeros(2, features.shape[1], dtype=torch.long), (9, 9))
    return kept, memory.alive + 0 * hidden.dim()


QFORMER, V2 = "a_minigpt4_qformer_vicuna", "c_minigptv2_lora_instruction"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (QFORMER, {}),
        (QFORMER, {"freeze_qformer": False}),
        (V2, {}),
        (V2, {"use_grad_checkpoint_llm": True}),
        (V2, {"freeze_vit": False}),
        (V2, {"freeze_llm": False, "lora_r": 0}),
    ],
)
def test_autocast_and_fused_kernels_keep_what_they_keep_on_a_gpu(name: str, changes: dict[str, Any]) -> None:
    model = skeleton(name, **changes)
    memory = LiveMemory(run=MetaOperations(is_step=True).run)
    with memory, GpuCalls(fused=True), torch.autocast("cpu", BF16):
        pretended = run_forward(model, META, memory)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake_cuda(model)
        memory = LiveMemory()
        with memory, FusedAttention(), cuda_autocast():
            real = run_forward(model, CUDA, memory)
    assert pretended[0] == real[0]
    assert pretended[1] == real[1]


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": functional.linear,
    "@": lambda x, w: x @ w.t(),
    "matmul": lambda x, w: torch.matmul(x, w.t()),
    "bmm": lambda x, w: torch.bmm(x[None], w.t()[None]),
    "einsum": lambda x, w: torch.einsum("nd,vd->nv", x, w),
    "conv2d": lambda x, w: functional.conv2d(x[None, None], w[None, None, :2, :2]),
    "gelu": lambda x, w: functional.gelu(x),
    "silu": lambda x, w: functional.silu(x),
    "layer_norm": lambda x, w: functional.layer_norm(x, (8,)),
    "group_norm": lambda x, w: functional.group_norm(x, 2),
    "pow": lambda x, w: x.pow(2),
    "**": lambda x, w: x**2,
    "rsqrt": lambda x, w: torch.rsqrt(x),
    "exp": lambda x, w: x.exp(),
    "log": lambda x, w: torch.log(x),
    "softplus": lambda x, w: functional.softplus(x),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "softmax": lambda x, w: functional.softmax(x, -1),
    "Tensor.softmax": lambda x, w: x.softmax(-1),
    "softmax in a dtype": lambda x, w: functional.softmax(x, -1, dtype=BF16),
    "log_softmax": lambda x, w: x.log_softmax(-1),
    "sum": lambda x, w: x.sum(),
    "mean": lambda x, w: x.mean(),
    "cumsum": lambda x, w: x.cumsum(0),
    "mse_loss": lambda x, w: functional.mse_loss(x, x),
    "cat": lambda x, w: torch.cat([x, x]),
    "cat of two dtypes": lambda x, w: torch.cat([x, x.float()]),
    "add": lambda x, w: x + x.float(),
    "dropout": lambda x, w: functional.dropout(x, 0.1),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_dtype_that_autocast_gives_it_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    def result(device: torch.device) -> Tensor:
        return CALLS[name](torch.empty(4, 8, dtype=dtype, device=device), torch.empty(6, 8, device=device))

    with GpuCalls(fused=True), torch.autocast("cpu", BF16):
        pretended = result(META)
    with FakeTensorMode(), cuda_autocast():
        real = result(CUDA)
    assert (pretended.dtype, pretended.shape) == (real.dtype, real.shape)
