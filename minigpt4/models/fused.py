"""Norms, rotary embedding and SwiGLU of a language model as one kernel each while it trains.

Between two matrix products a layer reads and writes its activations some twenty times; on a GPU that is a large part of
its time, and every step in between is kept for the backward. The kernels come from torch.compile, or from Liger (Hsu et
al. 2024, package liger-kernel). They take no part in products, attention, LoRA and dropout: what packs, quantises,
splits or adapts a model meets its own layers, and random draws are the same. Without gradients (evaluation, answers)
the library's code runs. They are used when they have given its values and gradients on this machine.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4.common.errors import ConfigError
from minigpt4.models.lean import LeanMLP, LeanNorm, put_before, runs_code_of
from minigpt4.models.packing import FAILURES

log = logging.getLogger(__name__)

LONG_RUN = 2000
"""Micro-batches from which ``auto`` compiles: the compiler takes about a minute, a step saves some hundredths."""
_ROTATION, _HALF_TURN = "apply_rotary_pos_emb", "rotate_half"
_LENGTHS = (24, 40)  # of rows that are compared: two, so that the compiler knows that lengths vary
_TIMED = 2048  # positions of the row that is timed
_BROKEN = (*FAILURES, OSError)
_WORTH = 1.1  # ``auto`` keeps kernels that are so many times as fast


@dataclass(frozen=True)
class Kernels:
    """norm: (x [..., D], weight [D], epsilon). swiglu: (gate, up [..., F]). rotate: (query, key [R, H, T, d], cos, sin
    [R, T, d]) -> both."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain() -> Kernels:
    """What transformers computes in a Llama, operation by operation."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return Kernels(_rms_norm, _swiglu, apply_rotary_pos_emb)


@cache
def compiled(backend: str = "inductor") -> Kernels:
    """The same by torch.compile. Only the length of a row is left open, so that no other length compiles again."""
    functions: list[Any] = [_rms_norm, _swiglu, plain().rotate]
    one, two, three = (_compile(function, backend) for function in functions)

    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result: Tensor = one(_open(x.flatten(0, -2), 0), weight, epsilon)
        return result.view(x.shape)

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        result: Tensor = two(_open(gate.flatten(0, -2), 0), _open(up.flatten(0, -2), 0))
        return result.view(gate.shape)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        result: Any = three(_open(query, 2), _open(key, 2), _open(cos, 1), _open(sin, 1))
        return result[0], result[1]

    return Kernels(norm, swiglu, rotate)


def _compile(function: Any, backend: str) -> Any:
    return torch.compile(function, backend=backend)


def liger() -> Kernels:
    """Those of the package liger-kernel. Raises ImportError."""
    functions: Any = importlib.import_module("liger_kernel.transformers.functional")

    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        # its backward would write over the gradient of its result, which the residual stream may still need
        result: Tensor = functions.liger_rms_norm(x, weight, epsilon, in_place=False)
        return result

    return Kernels(norm, functions.liger_swiglu, functions.liger_rope)


@dataclass(frozen=True)
class Choice:
    """name: none, compile or liger. why: for people."""

    name: str
    why: str


def choose(wanted: str, llm: Any, device: torch.device, dtype: torch.dtype, micro_batches: int) -> Choice:
    """Settles ``run.fused_layers`` for ``llm``, a causal LM of transformers.

    device, dtype: of its arithmetic, with autocast on. micro_batches: of the whole run and rank.
    Raises ConfigError when what was asked for does not work here.
    """
    if wanted == "auto":
        return _choose_by_itself(llm, device, dtype, micro_batches)
    if wanted == "none":
        return Choice("none", "plain (as asked for)")
    reason = problem(wanted, llm, device, dtype)
    if reason:
        raise ConfigError(f"run.fused_layers: {wanted} does not work here: {reason}; use auto or none")
    return _use(wanted, llm, device, "as asked for")


def follow(name: str, llm: Any, device: torch.device, dtype: torch.dtype, why: str) -> Choice:
    """What was chosen before, or by another rank, and not timed here: plain layers, or the kernels if they work."""
    reason = "" if name == "none" else problem(name, llm, device, dtype)
    if name == "none" or reason:
        return Choice("none", f"plain ({why})" if name == "none" else f"plain ({name} {why}, but here: {reason})")
    return _use(name, llm, device, why)


def _choose_by_itself(llm: Any, device: torch.device, dtype: torch.dtype, micro_batches: int) -> Choice:
    if device.type != "cuda":
        return Choice("none", "plain (on a CPU products take most of the time)")
    if llm.device.type == "meta":
        return Choice("none", "settled when a run starts (kernels must be tried out)")
    reasons = []
    for name in ("liger", "compile"):
        if name == "compile" and micro_batches < LONG_RUN:
            reasons.append(f"compile: pays in runs of {LONG_RUN} micro-batches, this one has {micro_batches}")
            continue
        reason = problem(name, llm, device, dtype)
        if reason:
            reasons.append(f"{name}: {reason}")
            continue
        try:
            ratio = times_faster(name, llm, device, dtype)
        except _BROKEN as error:  # such as no memory for the row that is timed
            reasons.append(f"{name}: {_told(error)}")
            continue
        if ratio >= _WORTH:
            return _use(name, llm, device, f"{ratio:.1f} times as fast as plain here")
        reasons.append(f"{name}: {ratio:.1f} times as fast as plain here")
    return Choice("none", f"plain ({'; '.join(reasons)})")


def problem(name: str, llm: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels cannot be used: what is missing, what they raise, how far they are from plain ones; or ''."""
    if not _places(llm).norms:
        return f"layers of {type(llm).__name__} are not those of a Llama"
    absent = missing(name, device)
    if absent or llm.device.type == "meta":
        return absent
    try:
        kernels = _KINDS[name]()
        for length in _LENGTHS:
            probe = _Probe(llm, device, dtype, length)
            right, found = probe.results(plain()), probe.results(kernels)
            for what, one, other in zip(_NAMES, found, right, strict=True):
                difference = float((one.float() - other.float()).norm() / other.float().norm())
                if not difference <= (2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4):
                    return f"{what} differ by {difference:.2g} from those of plain layers"
    except _BROKEN as error:
        return _told(error)
    return ""


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def missing(name: str, device: torch.device) -> str:
    """The program or package that kernels need and that is not there, or ''."""
    if name == "liger" and device.type != "cuda":
        return "Liger's kernels need a GPU"
    for package in ("liger_kernel", "triton") if name == "liger" else ("triton",):
        if device.type == "cuda" and importlib.util.find_spec(package) is None:
            return f"the package {package.replace('_', '-')} is not installed"
    compilers = [os.environ.get("CXX", "g++"), "c++", "clang++"]
    if name == "compile" and device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler (g++) is installed"
    return ""


def times_faster(name: str, llm: Any, device: torch.device, dtype: torch.dtype) -> float:
    """Time of plain layers over that of the kernels, forward and backward, products left out."""
    probe = _Probe(llm, device, dtype, _TIMED)
    seconds = []
    for kernels in (plain(), _KINDS[name]()):
        probe.results(kernels)  # whatever happens once
        _wait(device)
        begun = time.perf_counter()
        for _ in range(5):
            probe.results(kernels)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return seconds[0] / seconds[1]


def _use(name: str, llm: Any, device: torch.device, reason: str) -> Choice:
    counts = fuse(llm, _KINDS[name]())
    if name == "compile" and device.type != "meta":
        # What compiles again later, such as a row of text alone, falls back to plain code where that fails.
        torch._dynamo.config.suppress_errors = True
    how = "compiled (inductor)" if name == "compile" else "Liger kernels"
    return Choice(name, f"{how} for {counts}; {reason}")


def fuse(llm: Any, kernels: Kernels) -> str:
    """Gives ``kernels`` to the layers of ``llm`` whose code is known; says how many. Names of weights stay."""
    places = _places(llm)
    for norm in places.norms:
        norm.kernel = kernels.norm
    for mlp in places.mlps:
        mlp.kernel = kernels.swiglu
    for attention in places.attentions:
        attention.fused_forward = _rotating_by(kernels.rotate, type(attention).forward)
        attention.__class__ = put_before(_FusedAttention, type(attention))
    return f"{len(places.norms)} norms, {len(places.mlps)} SwiGLU, {len(places.attentions)} rotary embeddings"


class _FusedAttention:
    """Goes before an attention among the bases of a class."""

    fused_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, with another rotation while gradients are recorded."""
        if torch.is_grad_enabled():
            return self.fused_forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _rotating_by(rotate: Callable[..., Any], forward: Any) -> Callable[..., Any]:
    """The function ``forward`` in which the name of the rotation means ``rotate``; the module it is from stays."""
    names = {**forward.__globals__, _ROTATION: rotate}
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


@dataclass(frozen=True)
class _Places:
    norms: list[Any]
    mlps: list[Any]
    attentions: list[Any]


def _places(llm: Any) -> _Places:
    modules = list(llm.get_decoder().modules())
    return _Places(
        [module for module in modules if isinstance(module, LeanNorm)],
        [module for module in modules if isinstance(module, LeanMLP)],
        [module for module in modules if _rotates_as_llama(module)],
    )


def _rotates_as_llama(module: nn.Module) -> bool:
    forward: Any = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if _ROTATION not in names:
        return False
    own, llama = (inspect.unwrap(rotate) for rotate in (forward.__globals__[_ROTATION], plain().rotate))
    return runs_code_of(own, llama) and runs_code_of(own.__globals__.get(_HALF_TURN), llama.__globals__[_HALF_TURN])


_KINDS: dict[str, Callable[[], Kernels]] = {"compile": compiled, "liger": liger}
_NAMES = (
    "normed values", "gated values", "rotated queries", "rotated keys",
    "gradients of the norm", "gradients of the gate", "gradients of the gated", "gradients of queries",
    "gradients of keys",
)  # fmt: skip


class _Probe:
    """Random activations in the sizes of a layer of ``llm``, in one row of ``length`` positions."""

    def __init__(self, llm: Any, device: torch.device, dtype: torch.dtype, length: int) -> None:
        config, norm = llm.config, _places(llm).norms[-1]  # the last is as wide as the model; others may be as a head
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        generator = torch.Generator().manual_seed(length)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        residual = norm.weight.dtype  # of what flows past the layers: float32 where they train under autocast

        # the sizes and the strides of training; a parameter, as its size is part of the compiled code
        self.weight = nn.Parameter(
            torch.ones(len(norm.weight), device=device, dtype=norm.weight.dtype), norm.weight.requires_grad
        )
        self.epsilon = norm.variance_epsilon
        inner = int(config.intermediate_size)
        sizes = [(1, length, size) for size in (len(norm.weight), inner, inner, heads * width, kv_heads * width)]
        self.inputs, self.gradients = ([draw(*size) for size in sizes] for _ in range(2))
        self.inputs[0], self.gradients[0] = self.inputs[0].to(residual), self.gradients[0].to(residual)
        angles = torch.rand(1, length, width // 2, generator=generator).repeat(1, 1, 2).to(device)
        self.cos, self.sin, self.width = angles.cos().to(residual), angles.sin().to(residual), width

    def results(self, kernels: Kernels) -> Sequence[Tensor]:
        """Values and gradients, in the order of ``_NAMES``."""
        leaves = [tensor.clone().requires_grad_() for tensor in self.inputs]
        with torch.enable_grad():
            x, gate, up, query, key = (leaf * 1 for leaf in leaves)  # kernels may write over what they are given
            query, key = (part.view(1, part.shape[1], -1, self.width).transpose(1, 2) for part in (query, key))
            rotated = kernels.rotate(query, key, self.cos, self.sin)
            flat = [part.transpose(1, 2).flatten(2) for part in rotated]
            values = [kernels.norm(x, self.weight, self.epsilon), kernels.swiglu(gate, up), *flat]
            upstream = [self.gradients[i].to(v.dtype, copy=True) for i, v in zip((0, 1, 3, 4), values, strict=True)]
            gradients = torch.autograd.grad(values, leaves, upstream)
        return [value.detach() for value in (*values, *gradients)]


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _open(x: Tensor, dim: int) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
