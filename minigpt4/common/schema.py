"""The typed sections of a YAML file. Defaults live here, or in the subclass a name in YAML selects; nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minigpt4.common.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """``model:`` keys every architecture understands. Keys of the reference keep their names."""

    arch: str = "minigpt_v2"
    model_type: str = ""
    image_size: int = 224
    vit_model: str = "eva_clip_g"  # eva_clip_g, eva (sizes in vit_config), or any timm name
    vit_config: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the timm class
    vit_weights: str = ""  # file of the vision tower; "" = the published one of vit_model; "random" = none
    vit_precision: str = "auto"  # auto | fp16 | bf16 | fp32
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False
    freeze_vit: bool = True
    llama_model: str = ""  # Hugging Face directory or id of the language model and its tokenizer
    low_resource: bool = False  # int8 weights by bitsandbytes
    load_in_4bit: bool = False  # nf4 weights by bitsandbytes
    device_8bit: int = 0
    lora_r: int = 0
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    use_grad_checkpoint_llm: bool = False
    freeze_llm: bool = True
    prompt_path: str = ""  # one prompt per line; lines without <ImageHere> are ignored
    prompt_template: str = ""
    chat_template: bool = False  # wrap instructions in prompt_template while training
    max_txt_len: int = 160  # cap of the answer part, in tokens
    max_context_len: int = 3800  # cap of the prompt part, in positions
    end_sym: str = "\n"
    cache_vision: str = "off"
    ckpt: str = ""  # initial weights (alias: init_from)

    def __post_init__(self) -> None:
        if self.image_size <= 0:
            raise ConfigError(f"image_size must be > 0, got {self.image_size}")
        if self.lora_r < 0:
            raise ConfigError(f"lora_r must be >= 0 (0 turns LoRA off), got {self.lora_r}")
        if self.prompt_template and self.prompt_template.count("{}") != 1:
            raise ConfigError(f"prompt_template must hold '{{}}' once, got '{self.prompt_template}'")
        if self.low_resource and self.load_in_4bit:
            raise ConfigError("low_resource (int8) and load_in_4bit exclude each other")
        if self.max_txt_len < 1 or self.max_context_len < 1:
            raise ConfigError("max_txt_len and max_context_len must be >= 1")
        if self.vit_precision not in ("auto", "fp16", "bf16", "fp32"):
            raise ConfigError(f"vit_precision must be one of auto, fp16, bf16, fp32; got '{self.vit_precision}'")
        if self.cache_vision != "off":
            raise ConfigError(f"cache_vision must be off in this version, got '{self.cache_vision}'")


@dataclass(frozen=True)
class ProcessorConfig:
    """``vis_processor.train`` or ``text_processor.train`` of a data set."""

    name: str = ""
    image_size: int = 0  # accepted for old files; must equal model.image_size
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    min_scale: float = 0.5
    max_scale: float = 1.0
    prompt: str = ""
    max_words: int = 50


@dataclass(frozen=True)
class SplitProcessors:
    """Processors per split; ``eval`` falls back to ``train``."""

    train: ProcessorConfig = field(default_factory=ProcessorConfig)
    eval: ProcessorConfig = field(default_factory=ProcessorConfig)


@dataclass(frozen=True)
class ValConfig:
    """``datasets.X.val``: hold out a fraction of the images, or name a file of its own."""

    fraction: float = 0.0
    group_by: str = "image"
    ann_path: str = ""


@dataclass(frozen=True)
class DatasetConfig:
    """``datasets.<name>:`` keys every builder understands."""

    name: str = ""  # filled from the YAML key
    builder: str = "annotations"  # registered builder class
    type: str = "default"
    data_type: str = "images"
    build_info: dict[str, Any] = field(default_factory=dict)  # checked by the builder
    format: str = "auto"
    fields: dict[str, str] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    prompts_file: str = ""
    vis_processor: SplitProcessors = field(default_factory=SplitProcessors)
    text_processor: SplitProcessors = field(default_factory=SplitProcessors)
    process_text: list[str] = field(default_factory=lambda: ["questions"])  # what text_processor is applied to
    batch_size: int = 1
    sample_ratio: float | None = None
    on_error: str = "raise"  # raise | skip
    max_bad_fraction: float = 0.0
    image_backend: str = "exact"
    val: ValConfig = field(default_factory=ValConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {self.batch_size}")
        if self.sample_ratio is not None and self.sample_ratio < 0:
            raise ConfigError(f"sample_ratio must be >= 0, got {self.sample_ratio}")
        if self.on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error must be 'raise' or 'skip', got '{self.on_error}'")
        if not set(self.process_text) <= {"questions", "answers"}:
            raise ConfigError(f"process_text may hold 'questions' and 'answers', got {self.process_text}")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ConfigError(f"max_bad_fraction must be in 0..1, got {self.max_bad_fraction}")


@dataclass(frozen=True)
class RunConfig:
    """``run:`` keys. Iteration counts are micro-batches; a window is ``accum_grad_iters`` of them per rank."""

    task: str = "image_text_pretrain"
    runner: str = "runner_base"
    lr_sched: str = "linear_warmup_cosine_lr"
    init_lr: float = 3e-5
    min_lr: float = 1e-6
    warmup_lr: float = -1.0  # negative: starts at init_lr
    warmup_steps: int = 0
    lr_decay_rate: float | None = None
    weight_decay: float = 0.05
    beta2: float = 0.999
    clip_grad_norm: float = 1.0  # 0 turns clipping off
    max_epoch: int = 1
    iters_per_epoch: int | None = None
    accum_grad_iters: int = 1
    num_workers: int = 0
    seed: int = 42
    output_dir: str = "output"
    job_name: str = ""
    precision: str = "auto"  # auto | fp32 | bf16 | fp16
    packing: str = "auto"  # auto | packed | padded
    row_tokens: int = 4096
    recompute: str = "none"  # none | full
    parallel: str = "ddp"
    resume_ckpt_path: str | None = None  # a checkpoint directory, or 'auto'
    save_every: int | None = None  # iterations; absent = once per epoch
    keep_last: int = 3
    evaluate: bool = False
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    log_freq: int = 10
    device: str = "auto"  # auto | cuda | cpu
    distributed: bool = True
    world_size: int = 1
    dist_url: str = "env://"
    use_dist_eval_sampler: bool = True
    trackers: list[str] = field(default_factory=lambda: ["terminal", "jsonl"])
    wandb_log: bool = False
    plugins: list[str] = field(default_factory=list)
    name: str = ""
    save_path: str = ""

    def __post_init__(self) -> None:
        for key in ("max_epoch", "accum_grad_iters", "log_freq", "row_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be >= 1, got {getattr(self, key)}")
        if self.iters_per_epoch is not None and self.iters_per_epoch < 1:
            raise ConfigError(f"iters_per_epoch must be >= 1, got {self.iters_per_epoch}")
        for key, allowed in (
            ("precision", ("auto", "fp32", "bf16", "fp16")),
            ("packing", ("auto", "packed", "padded")),
            ("recompute", ("none", "full")),
            ("parallel", ("ddp",)),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}; got '{getattr(self, key)}'")


@dataclass(frozen=True)
class Config:
    """A whole file, checked. ``datasets`` keeps the order of the YAML."""

    model: ModelConfig
    datasets: dict[str, DatasetConfig]
    run: RunConfig
    evaluation_datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
