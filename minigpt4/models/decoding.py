"""How the next id is computed: with keys and values that grow, or by a compiled step over memory that stays in place.

A language model of 32 layers starts about 1,800 small operations for every id; on a fast GPU starting them takes longer
than computing them. A compiled step is one CUDA graph instead, and needs tensors of one size at one place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.cache_utils import Cache, StaticCache

from minigpt4.models.prompt_cache import keeps_positions

log = logging.getLogger(__name__)

MODES = ("auto", "dynamic", "static", "compiled")
"""dynamic: grows. static: memory of one size, not compiled (to compare). compiled: static, and one compiled step."""
COMPILE_AFTER = 1500
"""Steps after which ``auto`` compiles on a GPU: they have taken about the half minute that compiling takes."""
_SMALLEST = 512


class Decoding:
    """Chooses for one model, and keeps the memory of its compiled step.

    Whoever compiles, records and replays a CUDA graph must be one thread: PyTorch keeps graphs by thread.
    """

    def __init__(self) -> None:
        self.steps = 0  # taken so far
        self._told: set[str] = set()
        self._fixed: Cache | None = None
        self._shape = (0, 0)

    def choose(self, wanted: str, llm: Any, num_beams: int) -> str:
        """'dynamic', 'static' or 'compiled' for the next answer of ``llm``; every decision is logged once."""
        device = llm.device.type
        if wanted == "dynamic" or (wanted == "auto" and (device != "cuda" or self.steps < COMPILE_AFTER)):
            return "dynamic"
        obstacle = "beams are sorted anew at every step" if num_beams > 1 else unfit(llm)
        if obstacle:
            self._tell(f"answers are decoded step by step: {obstacle}")
            return "dynamic"
        mode = "compiled" if wanted == "auto" else wanted
        if mode == "compiled":
            self._tell("answers are decoded by a compiled step from now on; the first one waits for the compiler")
        return mode

    def arguments(self, mode: str, device: torch.device) -> dict[str, Any]:
        """What transformers' ``generate`` must be told besides the cache."""
        if mode == "static":
            return {"disable_compile": True}
        if device.type == "cuda":
            return {}  # transformers compiles by itself, mode reduce-overhead
        config: Any = CompileConfig(mode="default")
        config._compile_all_devices = True
        return {"compile_config": config}

    def load(self, llm: Any, held: Cache | None, rows: int, positions: int) -> Cache:
        """A static cache for ``rows`` of at most ``positions``, which begins with what ``held`` holds.

        Sizes are powers of two, and the last memory is used again: other sizes and places would be compiled again.
        """
        shape = (rows, _room(positions))
        if self._fixed is None or shape != self._shape:
            self._fixed = None  # its memory is free before the new one is taken
            self._fixed, self._shape = StaticCache(config=llm.config, max_cache_len=shape[1]), shape
        reset: Any = self._fixed.reset  # transformers leaves it untyped
        reset()
        if held is not None and held.get_seq_length():
            fixed: Any  # layers that hold keys and values; transformers' types allow others
            growing: Any
            for fixed, growing in zip(self._fixed.layers, held.layers, strict=True):
                known = torch.arange(growing.keys.shape[-2], device=growing.keys.device)
                fixed.update(growing.keys, growing.values, {"cache_position": known})
        return self._fixed

    @staticmethod
    def unload(fixed: Cache, held: Cache) -> None:
        """Give the positions that are new in ``fixed`` to ``held``."""
        known, total = int(held.get_seq_length()), int(fixed.get_seq_length())
        layer: Any
        for number, layer in enumerate(fixed.layers):
            held.update(layer.keys[..., known:total, :], layer.values[..., known:total, :], number)

    def run(self, mode: str, work: Callable[[], Tensor]) -> Tensor:
        """``work()``; a compiled step always runs in the same thread."""
        return _compiling_thread().submit(work).result() if mode == "compiled" else work()

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.info(message)


def unfit(llm: Any) -> str:
    """Why the keys and values of ``llm`` cannot stay in place, or ''."""
    config = llm.config.get_text_config(decoder=True)
    if not keeps_positions(llm):
        return "this model keeps a state that is no list of positions, or positions that change with the length"
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if others or getattr(config, "sliding_window", None):
        return "this model has a sliding window"
    if not getattr(llm, "_can_compile_fullgraph", False):
        return f"transformers does not compile a {config.model_type}"
    quantiser = getattr(llm, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_compileable:
        return "its quantised weights cannot be compiled"
    return ""


def _room(positions: int) -> int:
    size = _SMALLEST
    while size < positions:
        size *= 2
    return size


@cache
def _compiling_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
