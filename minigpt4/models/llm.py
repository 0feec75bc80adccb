"""Any causal language model of transformers, with int8/nf4 weights and LoRA."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.schema import ModelConfig
from minigpt4.conversation.encoding import Encoder
from minigpt4.models.llm_files import check_llm_directory
from minigpt4.models.load_report import LoadReport
from minigpt4.models.quantised import quantise_skeleton

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
"""peft's word for every linear layer but the head."""

# bitsandbytes tells everybody who has no GPU that an optional kernel package is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def build_llm(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, LoadReport | None]:
    """The causal LM with its weights in ``dtype`` (never cast up), frozen unless ``freeze_llm`` is False, with LoRA.

    On the meta device it has shapes alone, and no weight file is read. Raises ConfigError when the path is no language
    model, or a LoRA target is in no layer; CheckpointError when weights are missing or damaged.
    """
    path = cfg.llama_model
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ConfigError(f"model.llama_model: '{path}' holds no config.json")
    try:
        report = None
        if device.type == "meta" or cfg.llama_weights == "random":
            llm: Any = _without_file(path, device, dtype)
        else:
            llm, report = _from_files(cfg, device, dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.llama_model: '{path}' is not loadable: {str(error).splitlines()[0]}") from error
    if device.type == "meta" and (cfg.low_resource or cfg.load_in_4bit):
        quantise_skeleton(llm, cfg, dtype)
    llm.config.use_cache = False
    llm.requires_grad_(not cfg.freeze_llm)
    if cfg.use_grad_checkpoint_llm:
        # the name of older versions is deprecated in newer ones
        recompute = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
        recompute({"use_reentrant": False})
    if cfg.lora_r:
        with torch.device(device):
            llm = _add_lora(llm, cfg)
    return llm, report


def check_llm(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """What can be told before anything big is read: an incomplete directory, a precision that cannot work.

    Raises ConfigError and CheckpointError.
    """
    if cfg.low_resource and device.type == "cpu" and dtype == torch.float16:
        # bitsandbytes multiplies int8 through float matrices there, and autocast makes those fp16: sums overflow
        raise ConfigError("model.low_resource: int8 weights overflow in fp16 on a CPU; use precision fp32 or bf16")
    if Path(cfg.llama_model).is_dir() and cfg.llama_weights != "random":
        check_llm_directory(Path(cfg.llama_model))


def _from_files(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Any, LoadReport]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    transformers_logging: Any = logging
    is_quantised = cfg.low_resource or cfg.load_in_4bit
    # Differences of names and shapes are told by the report below, all of them and as an error.
    options: dict[str, Any] = {
        "dtype": dtype,  # attention: SDPA, or the family's own where it cannot use SDPA
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if is_quantised:
        options["quantization_config"] = _quantisation(cfg, dtype)
    if not (is_quantised and device.type == "cpu"):  # without a GPU a device map makes bitsandbytes look for a driver
        options["device_map"] = {"": device}  # tensor by tensor to where it stays: no second copy in host memory
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(cfg.llama_model, **options)
    llm, info = loaded
    return llm, _checked(llm, info, cfg.llama_model)


def _checked(llm: nn.Module, info: Mapping[str, Any], path: str) -> LoadReport:
    """The report of transformers' load. Raises CheckpointError for weights that it filled with random numbers."""
    report = LoadReport(path)
    report.missing = [f"llama_model.{name}" for name in sorted(info["missing_keys"])]
    report.unexpected = [f"llama_model.{name}" for name in sorted(info["unexpected_keys"])]
    report.mismatched = [f"llama_model.{name}" for name, *_ in sorted(info["mismatched_keys"])]
    absent = set(report.missing) | set(report.mismatched)
    report.add_loaded(name for name in (f"llama_model.{n}" for n, _ in llm.named_parameters()) if name not in absent)
    problems = []
    if report.missing:
        problems.append(f"lacks {len(report.missing)} tensors of its language model, first: {sorted(absent)[0]}")
    for name, found, ours in sorted(info["mismatched_keys"])[:3]:
        problems.append(f"{name} is {list(found)}, config.json says {list(ours)}")
    if problems:
        raise CheckpointError("\n".join(f"model.llama_model: '{path}' {problem}" for problem in problems))
    return report


def _without_file(path: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The architecture of ``config.json`` with random weights, or without any on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    with torch.device(device):
        return factory.from_config(AutoConfig.from_pretrained(path), dtype=dtype)


def _quantisation(cfg: ModelConfig, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig as _BitsAndBytesConfig

    BitsAndBytesConfig: Any = _BitsAndBytesConfig

    if cfg.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def _add_lora(llm: Any, cfg: ModelConfig) -> nn.Module:
    """Low-rank adapters (Hu et al. 2021) on ``lora_target_modules``; matrices are fp32 masters, the base is untouched.

    peft's ``prepare_model_for_kbit_training`` is not used: it casts every fp16 weight of the base to fp32.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    is_all = cfg.lora_target_modules == [ALL_LINEAR]
    kinds = (nn.Linear, Conv1D)  # GPT-2's layers are the latter
    names = {name.rsplit(".", 1)[-1] for name, module in llm.named_modules() if isinstance(module, kinds)}
    unknown = [target for target in cfg.lora_target_modules if target not in names]
    if unknown and not is_all:
        raise ConfigError(
            f"model.lora_target_modules: '{unknown[0]}' is in no layer of {cfg.llama_model}; "
            f"found: {', '.join(sorted(names))}; [{ALL_LINEAR}] means all but the head"
        )
    lora = LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=ALL_LINEAR if is_all else list(cfg.lora_target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft asks transformers for a name that transformers is about to drop
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(llm, lora)


def merge_lora(llm: Any) -> tuple[Any, str]:
    """The model with its adapters folded into its weights (W + scaling B A), and ''; or ``llm`` and why not.

    The sum is taken in float32 and rounded once to the dtype of the weights. Logits move by less than 1e-5 of their
    norm in float32; in half precision they are about as far from exact as before. The adapters are gone afterwards.
    """
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    adapted = [module for module in llm.modules() if isinstance(module, LoraLayer)]
    if not adapted:
        return llm, "it has no adapters"
    bases = [module.get_base_layer() for module in adapted]
    other = next((base for base in bases if type(base) not in (nn.Linear, Conv1D)), None)
    if other is not None:  # an 8- or 4-bit weight would lose most of the difference
        return llm, f"weights of {type(other).__name__} cannot take them up"
    embedding = causal_lm(llm).get_input_embeddings().weight
    if any(base.weight is embedding for base in bases):
        return llm, "one adapts the head, whose weight is the input embedding too"
    return llm.merge_and_unload(), ""


def causal_lm(llm: Any) -> Any:
    """The transformers model inside an optional peft wrapper (its layers keep their adapters)."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm


def check_vocabulary(encoder: Encoder, name: str, rows: int) -> None:
    """Raises ConfigError when an id that every text needs has no embedding of ``rows``; warns when others have none."""
    tokenizer = encoder.tokenizer
    needed = [tokenizer.eos_id, *encoder.stop_ids, *([] if tokenizer.bos_id is None else [tokenizer.bos_id])]
    if max(needed) >= rows:
        raise ConfigError(
            f"model.llama_model: the tokenizer of '{name}' ends with id {max(needed)}, its model has {rows} "
            "embeddings; they belong to different models"
        )
    lost = [text for text, number in tokenizer.special.items() if number >= rows]
    if lost:
        log.warning("%s: no embeddings for the special tokens %s; keep them out of texts", name, ", ".join(lost))
