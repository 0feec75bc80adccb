"""The parts a run is made of, each built from the configuration by one function."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minigpt4.common.dist import DistContext
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, ModelConfig, RunConfig
from minigpt4.common.types import IMAGE_TAG
from minigpt4.datasets.collate import SampleDataset
from minigpt4.datasets.sampler import WindowSampler
from minigpt4.models import fused
from minigpt4.models.base_model import BaseModel
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.llm import causal_lm
from minigpt4.models.recompute import recompute_mlps
from minigpt4.processors.base import ImageSpec
from minigpt4.tasks.phases import PhaseClock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long a run is. ``iters_per_epoch`` is whole windows of ``accumulation`` micro-batches per rank."""

    accumulation: int
    windows_per_epoch: int
    max_epoch: int

    @property
    def iters_per_epoch(self) -> int:
        """Micro-batches per rank and epoch."""
        return self.windows_per_epoch * self.accumulation

    @property
    def total_windows(self) -> int:
        """Optimiser steps of the whole run."""
        return self.windows_per_epoch * self.max_epoch

    def passes(self, datasets: Sequence[SampleDataset], sampler: WindowSampler, world_size: int) -> float:
        """Samples that all ranks draw in the whole run, over those of all sets that are drawn."""
        drawn = self.total_windows * self.accumulation * world_size * sampler.expected_samples_per_micro_batch()
        return drawn / sum(len(dataset) for dataset, share in zip(datasets, sampler.shares, strict=True) if share > 0)

    def windows(self, iterations: int) -> int:
        """Micro-batches in whole windows, rounded up."""
        return max(1, math.ceil(iterations / self.accumulation))

    def windows_between(self, iterations: int | None) -> int:
        """The same for what happens every so often; once per epoch when nothing is said."""
        return self.windows(iterations) if iterations else self.windows_per_epoch


def build_model(
    cfg: Config, device: torch.device, dtype: torch.dtype, is_vision_known: Callable[[str], bool] | None = None
) -> GenerationMixin:
    """The model of ``cfg.model`` with frozen weights in ``dtype``; ``run.recompute`` says what is computed twice.

    is_vision_known: see ``BaseModel.from_config``; None reads everything.
    Raises ConfigError for ``auto``: the command that trains chooses for the GPU before it builds.
    """
    model_cfg: ModelConfig = cfg.model
    if cfg.run.recompute == "auto":
        raise ConfigError("run.recompute: auto is settled by minigpt4 train; without it write none, mlp or full")
    if cfg.run.recompute == "full":
        model_cfg = replace(model_cfg, use_grad_checkpoint_llm=True, use_grad_checkpoint=not model_cfg.freeze_vit)
    make = partial(registry.get("model", model_cfg.arch).from_config, model_cfg, device, dtype, cfg.run.seed)
    model: GenerationMixin = make(is_vision_known=is_vision_known) if is_vision_known else make()
    if cfg.run.recompute == "mlp" and not model_cfg.use_grad_checkpoint_llm:
        recompute_mlps(causal_lm(model.llama_model))
    return model


def build_datasets(cfg: Config, model: BaseModel, split: str) -> list[SampleDataset]:
    """Data sets of one split in the YAML's order. Raises DataError for one without samples."""
    image = ImageSpec(model.cfg.image_size, model.image_mean, model.image_std)
    prompts = default_prompts(model.cfg)
    result: list[SampleDataset] = []
    for name, dataset_cfg in cfg.datasets.items():
        if split == "val" and not (dataset_cfg.val.fraction > 0 or dataset_cfg.val.ann_path):
            continue
        if dataset_cfg.sample_ratio == 0:  # never drawn: needs no files
            log.info("dataset %s: sample_ratio 0, left out", name)
            continue
        dataset: SampleDataset = registry.get("builder", dataset_cfg.builder)(dataset_cfg, image, prompts).build(split)
        if len(dataset) == 0:
            raise DataError(f"dataset '{name}', split {split}: has no samples")
        result.append(dataset)
    if split == "train" and not result:
        raise ConfigError("datasets: is empty; name at least one data set")
    return result


def make_plan(cfg: Config, datasets: list[SampleDataset], sampler: WindowSampler, world_size: int) -> Plan:
    """``iters_per_epoch`` in whole windows; absent, it is one pass over all sets that are drawn."""
    run = cfg.run
    iterations = run.iters_per_epoch
    if iterations is None:
        samples = sum(len(dataset) for dataset, share in zip(datasets, sampler.shares, strict=True) if share > 0)
        iterations = math.ceil(samples / (sampler.expected_samples_per_micro_batch() * world_size))
    plan = Plan(run.accum_grad_iters, math.ceil(iterations / run.accum_grad_iters), run.max_epoch)
    if run.iters_per_epoch is not None and plan.iters_per_epoch != run.iters_per_epoch:
        log.info(
            "iters_per_epoch %d is no multiple of accum_grad_iters %d: rounded up to %d, so that every window is whole",
            run.iters_per_epoch, run.accum_grad_iters, plan.iters_per_epoch,
        )  # fmt: skip
    return plan


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the arithmetic. auto: bf16 where the GPU computes in it, fp16 on older ones, fp32 on a CPU."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def choose_packing(name: str, model: BaseModel) -> str:
    """'packed' or 'padded'; auto: packed where attention over a packed row costs what its samples cost.

    Raises ConfigError for packed rows in a model whose samples would see each other.
    """
    if name == "packed" and not model.keeps_samples_apart:
        raise ConfigError(
            f"run.packing packed: samples in one row of {model.cfg.llama_model} see each other; use padded"
        )
    if name != "auto":
        return name
    return "packed" if model.attends_by_sample else "padded"  # else it would be one dense T x T block


def describe_rows(run: RunConfig, packing: str, model: BaseModel) -> str:
    """Settles how attention over packed rows is computed; a line for people. Raises ConfigError if it cannot be so."""
    if packing != "packed" or not model.attends_by_sample:
        if run.packing_backend not in ("auto", "per_sample"):
            raise ConfigError(
                f"run.packing_backend: {run.packing_backend} is for rows packed by sample; this run's are {packing}"
            )
        return f"{packing} rows"
    reason = model.choose_packing_backend(run.packing_backend)
    return f"packed rows, attention {model.packing_backend} ({reason})"


def settle_layers(run: RunConfig, model: BaseModel, plan: Plan, dist: DistContext, before: str = "") -> fused.Choice:
    """Settles what computes norms, rotary embedding and SwiGLU of the language model.

    ``auto`` times kernels, which may end otherwise another time: a resumed run keeps what its checkpoint says
    (``before``), and all ranks do as the first one. Raises ConfigError if it cannot be as ``run.fused_layers`` says.
    """
    if run.evaluate or not isinstance(model, BaseModel):  # a model of another kind has layers of its own
        return fused.Choice("none", "plain")
    llm, device, is_free = causal_lm(model.llama_model), dist.device, run.fused_layers == "auto"
    if run.fused_layers != "none" and device.type == "cuda":
        log.info(
            "run.fused_layers %s: kernels are tried out; where they are compiled it takes a while", run.fused_layers
        )
    with model.autocast():
        iterations = plan.total_windows * plan.accumulation
        if is_free and before:
            return fused.follow(before, llm, device, model.dtype, "as before the resume")
        leads = dist.is_main or not is_free
        choice = fused.choose(run.fused_layers, llm, device, model.dtype, iterations) if leads else None
        name = dist.broadcast_object(choice and choice.name) if is_free else ""
        return choice or fused.follow(name, llm, device, model.dtype, "as on rank 0")


def ratios_of(datasets: Sequence[SampleDataset], temperature: float | None) -> list[float]:
    """Relative weights of drawing a micro-batch; where the YAML gives none equal ones, or by size ** temperature."""
    if temperature is not None and all(dataset.cfg.sample_ratio is None for dataset in datasets):
        return [len(dataset) ** temperature / dataset.cfg.batch_size for dataset in datasets]  # counts samples
    return [1.0 if dataset.cfg.sample_ratio is None else dataset.cfg.sample_ratio for dataset in datasets]


def build_sampler(cfg: Config, datasets: list[SampleDataset], dist: DistContext) -> WindowSampler:
    """The order of samples of this rank, a pure function of the seed and the window."""
    return WindowSampler(
        sizes=[len(dataset) for dataset in datasets],
        ratios=ratios_of(datasets, cfg.run.mix_temperature),
        batch_sizes=[dataset.cfg.batch_size for dataset in datasets],
        accumulation=cfg.run.accum_grad_iters,
        world_size=dist.world_size,
        rank=dist.rank,
        seed=cfg.run.seed,
        groups=[dataset.groups() for dataset in datasets],
    )


def default_prompts(cfg: ModelConfig) -> tuple[str, ...]:
    """Prompts for data sets that bring none (stage 2 of MiniGPT-4): the lines of ``prompt_path`` with an image.

    They come in ``prompt_template``, as in MiniGPT-4, unless ``chat_template`` makes the encoder wrap every prompt.
    """
    if not cfg.prompt_path:
        return ()
    lines = Path(cfg.prompt_path).read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if IMAGE_TAG in line]
    if cfg.prompt_template and not cfg.wraps_prompts:
        prompts = [cfg.prompt_template.replace("{}", prompt) for prompt in prompts]
    return tuple(prompts)


def raise_file_limit() -> None:
    """More open files than the usual 1024: every tensor that a loader worker hands over holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def can_defer(device: torch.device) -> bool:
    """Whether a window's figures may be read while the next one is computed (``Training.defer``).

    A CPU computes nothing meanwhile. Split weights (figures are whole on every rank, and so is the verdict) and the
    loss scaling of fp16 (an overflow makes the norm infinite, and the scale changes on the device) are no obstacle.
    """
    return device.type == "cuda"


def watch_phases(model: BaseModel, dist: DistContext) -> PhaseClock:
    """The clock of rank 0, which the language decoder of ``model`` tells when it starts: until then a row was vision.

    The clocks of other ranks never run, because nobody reads them.
    """
    clock = PhaseClock(dist.device if dist.is_main else None)
    if isinstance(model, BaseModel):  # a model of another kind has no decoder to ask; all of it counts as language
        decoder: nn.Module = causal_lm(model.llama_model).get_decoder()
        decoder.register_forward_pre_hook(lambda *_: clock.mark("vision"))
    return clock


def memory_gb(clock: PhaseClock) -> float:
    """Peak of live tensors on a GPU; peak resident memory of the process on a CPU."""
    highest = clock.highest() / 2**30
    return highest or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
