"""The language model with bitsandbytes' int8 or nf4 layers, as shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import ModelConfig


def quantise_skeleton(llm: Any, cfg: ModelConfig, dtype: torch.dtype) -> None:
    """On the meta device: every linear layer but the head becomes the one that quantised loading puts there.

    Packed weights and their scales have their real sizes. Raises ConfigError when bitsandbytes is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        key = "load_in_4bit" if cfg.load_in_4bit else "low_resource"
        raise ConfigError(f"model.{key} needs the package bitsandbytes, which is not installed") from error
    # its table of 8-bit levels is made once per process, on the device that asks first; made on meta it has no values
    bitsandbytes.functional.quantize_blockwise(torch.zeros(1))
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers, weights the other way round

    layers: Any = bitsandbytes.nn
    meta = torch.device("meta")
    head = llm.get_output_embeddings()
    for name, module in list(llm.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or module is head:
            continue
        sizes = tuple(module.weight.shape if type(module) is Conv1D else module.weight.shape[::-1])  # in, out
        sizes = (*sizes, module.bias is not None)
        if cfg.load_in_4bit:
            layer = layers.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device=meta)
            layer.weight = layer.weight._quantize(meta)
        else:
            # threshold 0: how many columns of an input hold outliers depends on its values
            layer = layers.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0, device=meta)
            layer.weight = layer.weight._quantize(meta)
        llm.set_submodule(name, layer)
    llm.is_loaded_in_4bit, llm.is_loaded_in_8bit = cfg.load_in_4bit, cfg.low_resource  # peft asks for them
