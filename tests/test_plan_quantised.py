"""int8 and nf4 language models as shapes: the bytes of the ones that bitsandbytes makes."""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes
import pytest
import torch
from torch import nn

from minigpt4.common.registry import registry
from minigpt4.tools.planner.skeleton import parts_of
from tests.golden_cases import build_config, load_case

V2 = "c_minigptv2_lora_instruction"


def moved_scales(model: nn.Module) -> int:
    """Bytes of int8 scales that a first call moves from the weight to its layer."""
    layers = (module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt))
    return sum(layer.state.SCB.nbytes for layer in layers if layer.weight.SCB is None)


@pytest.mark.parametrize("key", ["low_resource", "load_in_4bit"])
def test_a_quantised_skeleton_has_the_bytes_of_the_quantised_model(key: str) -> None:
    cfg = replace(build_config(load_case(V2)), **{key: True})
    model_class = registry.get("model", cfg.arch)
    # the skeleton first: bitsandbytes keeps tables for the whole process, and a skeleton's have no values
    skeleton = parts_of(model_class.from_config(cfg, torch.device("meta"), torch.float32))
    real = model_class.from_config(cfg, torch.device("cpu"), torch.float32)
    assert [replace(part, bytes=0) for part in skeleton] == [replace(part, bytes=0) for part in parts_of(real)]
    assert sum(part.bytes for part in skeleton) == sum(part.bytes for part in parts_of(real)) + moved_scales(real)


def test_a_quantised_skeleton_keeps_its_parameters_and_its_head() -> None:
    cfg = build_config(load_case(V2))
    model_class = registry.get("model", cfg.arch)
    counts = {}
    for key in ("", "low_resource", "load_in_4bit"):
        changed = replace(cfg, **({key: True} if key else {}))
        parts = parts_of(model_class.from_config(changed, torch.device("meta"), torch.bfloat16))
        counts[key] = sum(part.count for part in parts if part.name == "llama_model")
        plain = {part.dtype: part.count for part in parts if part.name == "llama_model" and part.count}
        assert set(plain) == {"bf16", *({"low_resource": ["int8"], "load_in_4bit": ["nf4"]}.get(key, []))}
    assert len(set(counts.values())) == 1
