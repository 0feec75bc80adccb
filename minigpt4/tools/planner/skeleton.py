"""The model a configuration describes, without weights; its variants; bytes of its parts."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.common.schema import Config
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.weights import canonical_name, part_of
from minigpt4.runners.parts import build_model
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner.pretend import MetaOperations
from minigpt4.tools.planner.split import Ranks, shard_size

_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
_13B = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
LLM_SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": {**_7B, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama2-13b": {**_13B, "vocab_size": 32000, "max_position_embeddings": 4096},
    "vicuna-7b": {**_7B, "vocab_size": 32001, "max_position_embeddings": 2048},
    "vicuna-13b": {**_13B, "vocab_size": 32001, "max_position_embeddings": 2048},
}
"""Language models whose sizes are known without a file (Vicuna: v0, with its extra padding token)."""
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


POLICIES = ("none", "mlp", "full")
"""Values of run.recompute that say what is computed twice, from the fastest to the smallest."""


@dataclass(frozen=True)
class Variant:
    """What may be changed so that a run fits. precision: bf16 | fp16 | fp32. base: as is | int8 | nf4.

    recompute: none | mlp | full. cached: features of a vision cache take the place of pixels. shards: ranks that fsdp
    splits the model over; 1 = it is whole on every GPU.
    """

    precision: str
    base: str
    recompute: str
    cached: bool = False
    shards: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic and of frozen weights."""
        return next(dtype for dtype, name in DTYPES.items() if name == self.precision)

    @property
    def text(self) -> str:
        """For people."""
        text = f"{self.base if self.base != 'as is' else self.precision} base, recompute {self.recompute}"
        text += ", cached vision" if self.cached else ""
        return text + (f", fsdp over {self.shards} GPUs" if self.shards > 1 else "")

    @property
    def skeleton(self) -> Variant:
        """What decides the model itself."""
        return replace(self, cached=False, shards=1)

    def applied(self, cfg: Config) -> Config:
        """``cfg`` with these settings."""
        is_quantised = self.base != "as is"
        model = replace(
            cfg.model,
            low_resource=self.base == "int8",
            load_in_4bit=self.base == "nf4",
            llama_weights="" if is_quantised else cfg.model.llama_weights,
            use_grad_checkpoint_llm=self.recompute == "full",
        )
        return replace(cfg, model=model, run=replace(cfg.run, precision=self.precision, recompute=self.recompute))


def configured_variant(cfg: Config, on_gpu: bool, ranks: Ranks | None = None) -> Variant:
    """What ``cfg`` says. precision auto: bf16 on the GPU that is planned for, fp32 on a CPU.

    cache_vision auto counts as off: ``choice.is_cached`` knows more. ranks: None for one.
    """
    precision = cfg.run.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    base = "nf4" if cfg.model.load_in_4bit else "int8" if cfg.model.low_resource else "as is"
    recompute = "full" if cfg.model.use_grad_checkpoint_llm else cfg.run.recompute
    recompute = POLICIES[0] if recompute == "auto" else recompute
    cached = cfg.model.cache_vision in ("memory", "disk")
    return Variant(precision, base, recompute, cached, 1 if ranks is None else ranks.shards(cfg.run))


def build_skeleton(cfg: Config, variant: Variant, on_gpu: bool) -> GenerationMixin:
    """The model on the meta device. Raises ConfigError as building it for training would."""
    if not on_gpu:  # towers compute in float32 on a CPU
        cfg = replace(cfg, model=replace(cfg.model, vit_precision="fp32"))
    with LiveMemory(
        run=MetaOperations(is_step=False).run
    ):  # initial values of 39 equal blocks are the most of the time
        return build_model(variant.applied(cfg), torch.device("meta"), variant.dtype)


@contextlib.contextmanager
def language_model_files(cfg: Config, shape: str) -> Iterator[Config]:
    """``cfg`` with a language model that can be planned: its own, or one of the sizes ``shape`` names.

    Raises ConfigError for an unknown shape, and for a directory that is not there when no shape is given.
    """
    if not shape:
        _check_present(cfg.model.llama_model)
        yield cfg
        return
    if shape not in LLM_SHAPES:
        raise ConfigError(f"--llm-shape: unknown '{shape}'{nearest(shape, LLM_SHAPES)}; known: {', '.join(LLM_SHAPES)}")
    with tempfile.TemporaryDirectory() as folder:
        _write_language_model(Path(folder), LLM_SHAPES[shape])
        yield replace(cfg, model=replace(cfg.model, llama_model=folder))


def _check_present(path: str) -> None:
    if Path(path).is_dir() or _is_on_hub(path):
        return
    size = "13b" if "13b" in path.lower() else "7b"
    shape = f"{'vicuna' if 'vicuna' in path.lower() else 'llama2'}-{size}"
    raise ConfigError(
        f"model.llama_model: '{path}' not found; a plan needs its config.json and tokenizer, no weights. "
        f"Without any file: --llm-shape {shape} (known: {', '.join(LLM_SHAPES)})"
    )


def _is_on_hub(path: str) -> bool:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError):  # not there, no connection, or no id at all
        return False
    return True


def _write_language_model(folder: Path, shape: Mapping[str, int]) -> None:
    """config.json and a tokenizer of three words: no text is encoded, but a model does not come without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast as _PreTrainedTokenizerFast

    PreTrainedTokenizerFast: Any = _PreTrainedTokenizerFast
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps({**config, **shape}), encoding="utf-8")
    words: Any = WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class PartBytes:
    """One part of the model in one dtype. count: parameters, also of packed ones; bytes: with scales and buffers."""

    name: str
    dtype: str
    trains: bool
    count: int
    bytes: int


def parts_of(
    model: nn.Module, gone: Collection[str] = (), shards: int = 1, whole: Collection[nn.Parameter] = ()
) -> list[PartBytes]:
    """Parts of a skeleton that has not run yet, in the order of its parameters. gone: children that left the device.

    shards: ranks, of which each holds its part of all parameters but ``whole``; counts stay those of all ranks.
    """
    counts: dict[tuple[str, str, bool], list[int]] = {}
    uncut = set(whole)
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in gone:
            continue
        packed = getattr(parameter, "quant_state", None)
        dtype = "nf4" if packed is not None else "int8" if parameter.dtype == torch.int8 else DTYPES[parameter.dtype]
        row = counts.setdefault((part_of(canonical_name(name)), dtype, parameter.requires_grad), [0, 0])
        row[0] += parameter.numel() if packed is None else packed.shape.numel()
        is_whole = shards == 1 or parameter in uncut
        own = parameter.nbytes if is_whole else shard_size(parameter.shape, shards) * parameter.element_size()
        row[1] += own + sum(tensor.nbytes for tensor in _scales(parameter))
    for name, buffer in model.named_buffers():
        if name.split(".")[0] in gone:
            continue
        row = counts.setdefault((part_of(canonical_name(name)), DTYPES.get(buffer.dtype, "other"), False), [0, 0])
        row[1] += buffer.nbytes
    return [PartBytes(*key, *row) for key, row in counts.items()]


def _scales(parameter: nn.Parameter) -> list[Tensor]:
    """What bitsandbytes keeps beside a packed weight: a scale per row (int8), scales per block and their scales."""
    holders = [parameter, getattr(parameter, "quant_state", None)]
    holders.append(getattr(holders[1], "state2", None))
    names = ("SCB", "absmax", "code", "offset")
    found = {}
    for holder in holders[1:] if holders[1] is not None else holders[:1]:
        found.update({id(value): value for name in names if isinstance(value := getattr(holder, name, None), Tensor)})
    return list(found.values())
