"""The typed sections of a YAML file. Defaults live here, or in the subclass a name in YAML selects; nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minigpt4.common.errors import ConfigError

TOKENIZER_TEMPLATE = "tokenizer"
"""``prompt_template`` that stands for the chat template of the tokenizer."""
CACHE_MODES = ("off", "memory", "disk", "auto")
"""Values of ``cache_vision``."""
AUTO_END = "auto"
"""``end_sym`` that stands for whatever ends an answer in the template, or else for the end token."""


@dataclass(frozen=True)
class ModelConfig:
    """``model:`` keys every architecture understands. Keys of MiniGPT-4 keep their names."""

    arch: str = "minigpt_v2"  # registered model
    model_type: str = ""  # which defaults of arch to start from: configs/models/<arch>-<model_type>.yaml
    image_size: int = 224  # side of the square input, in pixels; a multiple of the patch size
    vit_model: str = "eva_clip_g"  # eva_clip_g, eva (sizes in vit_config), or any timm name
    vit_config: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the timm class
    vit_weights: str = ""  # file of the vision tower; "" = the published one of vit_model; "random" = none
    vit_precision: str = "auto"  # of a frozen tower on a GPU: auto (that of the run) | fp16 | bf16 | fp32
    drop_path_rate: float = 0.0  # stochastic depth of the vision tower
    use_grad_checkpoint: bool = False  # vision blocks are recomputed in the backward pass: less memory, more time
    freeze_vit: bool = True  # False trains the vision tower too
    vision_tokens_per_position: int = 4  # neighbouring patches side by side in one position; without a Q-Former
    llama_model: str = ""  # Hugging Face directory or id of the language model and its tokenizer
    llama_weights: str = ""  # "" = those of llama_model; "random" = its config.json alone, for tests and measurements
    low_resource: bool = False  # int8 weights by bitsandbytes
    load_in_4bit: bool = False  # nf4 weights by bitsandbytes
    lora_r: int = 0  # rank of LoRA; 0 turns it off
    lora_alpha: int = 16  # LoRA's output is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.05  # dropout in front of LoRA
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])  # layers, or [all-linear]
    use_grad_checkpoint_llm: bool = False  # the language model's layers are recomputed likewise
    freeze_llm: bool = True  # False trains the whole language model
    prompt_path: str = ""  # one prompt per line; lines without <ImageHere> are ignored
    prompt_template: str = ""  # text around an instruction, {} is the instruction; tokenizer = its own chat template
    chat_template: bool = False  # wrap instructions in prompt_template while training; tokenizer always does
    max_txt_len: int = 160  # cap of the answer part, in tokens
    max_context_len: int = 3800  # cap of the prompt part, in positions
    end_sym: str = "\n"  # text after every answer; training teaches it, chat stops at it; auto = the template's, or eos
    chat_format: str = "auto"  # how chat writes a conversation: auto (by model_type), or a registered template
    # auto = disk for runs that see a picture twice, if half of the free space is enough
    cache_vision: str = "off"  # frozen vision features kept for reuse: off | memory | disk | auto (disk where it pays)
    ckpt: str = ""  # initial weights (alias: init_from)

    def __post_init__(self) -> None:
        for key in ("image_size", "vision_tokens_per_position"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"{key} must be > 0, got {getattr(self, key)}")
        if self.lora_r < 0:
            raise ConfigError(f"lora_r must be >= 0 (0 turns LoRA off), got {self.lora_r}")
        if self.prompt_template == TOKENIZER_TEMPLATE:
            if self.end_sym == "\n":
                raise ConfigError("prompt_template tokenizer goes with end_sym auto: the end its chat template writes")
        elif self.prompt_template and self.prompt_template.count("{}") != 1:
            raise ConfigError(
                f"prompt_template must hold '{{}}' once, or be '{TOKENIZER_TEMPLATE}'; got '{self.prompt_template}'"
            )
        if self.low_resource and self.load_in_4bit:
            raise ConfigError("low_resource (int8) and load_in_4bit exclude each other")
        if self.max_txt_len < 1 or self.max_context_len < 1:
            raise ConfigError("max_txt_len and max_context_len must be >= 1")
        if self.llama_weights not in ("", "random"):
            raise ConfigError(f"llama_weights must be empty or random, got '{self.llama_weights}'")
        if self.llama_weights and (self.low_resource or self.load_in_4bit):
            raise ConfigError("llama_weights random cannot be quantised; remove low_resource or load_in_4bit")
        if self.vit_precision not in ("auto", "fp16", "bf16", "fp32"):
            raise ConfigError(f"vit_precision must be one of auto, fp16, bf16, fp32; got '{self.vit_precision}'")
        if self.cache_vision not in CACHE_MODES:
            raise ConfigError(f"cache_vision must be one of {', '.join(CACHE_MODES)}; got '{self.cache_vision}'")
        if self.cache_vision in ("memory", "disk") and not self.freeze_vit:
            raise ConfigError(f"cache_vision {self.cache_vision} needs a frozen vision part, but freeze_vit is False")

    @property
    def wraps_prompts(self) -> bool:
        """Whether the encoder puts single instructions into the template."""
        return self.chat_template or self.prompt_template == TOKENIZER_TEMPLATE


@dataclass(frozen=True)
class ProcessorConfig:
    """``vis_processor.train`` or ``text_processor.train`` of a data set."""

    name: str = ""  # registered processor
    mean: list[float] = field(default_factory=list)  # of the image, per channel; [] = the vision tower's
    std: list[float] = field(default_factory=list)  # of the image, per channel; [] = the vision tower's
    prompt: str = ""  # text in front of every text
    max_words: int = 50  # longer texts are cut


@dataclass(frozen=True)
class SplitProcessors:
    """Processors per split; ``eval`` falls back to ``train``."""

    train: ProcessorConfig = field(default_factory=ProcessorConfig)  # of the training split
    eval: ProcessorConfig = field(default_factory=ProcessorConfig)  # of other splits; without a name that of train


@dataclass(frozen=True)
class ValConfig:
    """``datasets.X.val``: hold out a fraction of the images, or name a file of its own."""

    fraction: float = 0.0  # share held out; all records of one group fall on one side
    group_by: str = "image"  # 'image', or any field of a record
    ann_path: str = ""  # annotation file of the validation split

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise ConfigError(f"val.fraction must be >= 0 and < 1, got {self.fraction}")
        if self.fraction and self.ann_path:
            raise ConfigError("val.fraction and val.ann_path exclude each other; keep one")


@dataclass(frozen=True)
class BalanceConfig:
    """``datasets.X.balance``: how often groups of records are drawn inside one data set."""

    by: str = ""  # what makes a group: section, or any field of a record; "" = no groups
    temperature: float = 0.0  # groups are drawn by size ** temperature: 0 = all equally often, 1 = as the data are

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 1.0:
            raise ConfigError(f"balance.temperature must be in 0..1, got {self.temperature}")


@dataclass(frozen=True)
class DatasetConfig:
    """``datasets.<name>:`` keys every builder understands."""

    name: str = ""  # filled from the YAML key
    builder: str = "annotations"  # registered builder class
    data_type: str = "images"  # images | text (records name no picture)
    build_info: dict[str, Any] = field(default_factory=dict)  # checked by the builder
    format: str = "auto"  # registered format; auto = recognised by the fields of the records
    fields: dict[str, str] = field(default_factory=dict)  # name the format knows: column of the file
    box_format: str = "xywh"  # field box: xywh (x, y, width, height) | xyxy (left, top, right, bottom)
    box_unit: str = "pixels"  # of the box: pixels | 0..1 | 0..100 (shares or percents of width and height)
    prompts: list[str] = field(default_factory=list)  # what to ask; the format says how they are used
    prompts_file: str = ""  # the same from a text file, one prompt per line
    vis_processor: SplitProcessors = field(default_factory=SplitProcessors)  # pixels: {train: {name: ...}}
    text_processor: SplitProcessors = field(default_factory=SplitProcessors)  # cleaning of text: {train: {name: ...}}
    # text_processor cleans questions (with the prompt around them), answers, or fields (the record's text, no prompts)
    process_text: list[str] = field(default_factory=lambda: ["questions"])  # cleaned: questions | answers | fields
    batch_size: int = 1  # samples per micro-batch and GPU
    sample_ratio: float | None = None  # relative weight of drawing; 0 leaves the set out; all sets or none
    balance: BalanceConfig = field(default_factory=BalanceConfig)  # draws within the set, by group
    on_error: str = "raise"  # a sample that cannot be read: raise stops the run, skip takes the next one
    max_bad_fraction: float = 0.0  # with skip: more broken samples than this share stop the run
    # fast is torchvision for JPEG: its bicubic filter rounds differently, so pixels are 1 of 256 levels off at most
    image_backend: str = "exact"  # exact = the reference's bits; fast = half the time for JPEG, 1 of 256 levels off
    val: ValConfig = field(default_factory=ValConfig)  # held-out part

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1, got {self.batch_size}")
        if self.sample_ratio is not None and self.sample_ratio < 0:
            raise ConfigError(f"sample_ratio must be >= 0, got {self.sample_ratio}")
        for key, allowed in (
            ("on_error", ("raise", "skip")),
            ("box_format", ("xywh", "xyxy")),
            ("box_unit", ("pixels", "0..1", "0..100")),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}; got '{getattr(self, key)}'")
        if not set(self.process_text) <= {"questions", "answers", "fields"}:
            raise ConfigError(f"process_text may hold 'questions', 'answers' and 'fields', got {self.process_text}")
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise ConfigError(f"max_bad_fraction must be in 0..1, got {self.max_bad_fraction}")

    @property
    def has_held_out(self) -> bool:
        """Whether a part of the data is kept for validation."""
        return self.val.fraction > 0 or bool(self.val.ann_path)


@dataclass(frozen=True)
class CanaryConfig:
    """A question asked at every validation, to watch the answer change."""

    question: str = ""  # what is asked
    image: str = ""  # picture file; "" = a question without a picture


@dataclass(frozen=True)
class ValidConfig:
    """``run.valid``: what is measured on the held-out parts (``datasets.X.val``), and what depends on it."""

    every: int | None = None  # iterations between validations; absent = at every checkpoint
    metrics: list[str] = field(default_factory=lambda: ["loss"])  # loss, and registered metrics of generated answers
    best_by: str = ""  # what decides 'best': a metric, or metric/data set; "" = the first of metrics
    patience: int = 0  # validations without a better value that end the run; 0 = never
    max_samples: int = 256  # per data set, whose answers are generated
    max_new_tokens: int = 64  # longest generated answer
    canaries: list[CanaryConfig] = field(default_factory=list)  # questions of your own, asked at every validation
    num_canaries: int = 2  # held-out samples asked besides

    def __post_init__(self) -> None:
        for key, least in (("patience", 0), ("num_canaries", 0), ("max_samples", 1), ("max_new_tokens", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"valid.{key} must be >= {least}, got {getattr(self, key)}")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"valid.every must be >= 1, got {self.every}")
        if not self.metrics:
            raise ConfigError("valid.metrics is empty; write [loss], or leave it out")
        if self.best_by and self.best_by.partition("/")[0] not in self.metrics:
            raise ConfigError(f"valid.best_by '{self.best_by}' is none of valid.metrics: {', '.join(self.metrics)}")

    @property
    def decides(self) -> str:
        """The metric, or metric/data set, that decides which checkpoint is best."""
        return self.best_by or self.metrics[0]


@dataclass(frozen=True)
class RunConfig:
    """``run:`` keys. Iteration counts are micro-batches; a window is ``accum_grad_iters`` of them per rank."""

    task: str = "image_text_pretrain"  # registered task
    runner: str = "runner_base"  # registered runner
    lr_sched: str = "linear_warmup_cosine_lr"  # registered schedule
    init_lr: float = 3e-5  # peak learning rate
    min_lr: float = 1e-6  # lowest learning rate
    warmup_lr: float = -1.0  # where the warm-up starts; negative: at init_lr
    warmup_steps: int = 0  # iterations of the linear warm-up, once per run
    lr_decay_rate: float | None = None  # factor per epoch of linear_warmup_step_lr
    weight_decay: float = 0.05  # of weight matrices; biases and norms have none
    beta2: float = 0.999  # of AdamW
    clip_grad_norm: float = 1.0  # 0 turns clipping off
    max_epoch: int = 1  # the run has max_epoch x iters_per_epoch iterations
    iters_per_epoch: int | None = None  # iterations per epoch and rank; absent = one pass over the data
    accum_grad_iters: int = 1  # iterations per optimiser step
    # 1 = samples come by the sizes of the sets, 0 = equally many of each; absent = micro-batches of each equally often
    mix_temperature: float | None = None  # 0..1; without any sample_ratio, sets are drawn by size ** mix_temperature
    num_workers: int = 0  # loader processes per rank; 0 = none
    seed: int = 42  # decides order, drawing and dropout
    output_dir: str = "output"  # where job folders are made
    cache_root: str = ""  # folder of both caches on disk; "" = MINIGPT4_CACHE, else vision_cache in output_dir
    cache_images: bool = False  # keep decoded and scaled pictures on disk as they are first read
    job_name: str = ""  # folder below output_dir; empty = name of the YAML file
    precision: str = "auto"  # fp32 | bf16 | fp16 | auto (bf16 where the GPU has it, else fp16; fp32 on a CPU)
    packing: str = "auto"  # auto | packed (rows without padding) | padded
    packing_backend: str = "auto"  # of attention: auto (varlen if equal here) | varlen | flex | mask | per_sample
    row_tokens: int = 4096  # longest packed row, in tokens
    # fused_layers: norms, rotary embedding and SwiGLU of the language model as one kernel each while it trains
    fused_layers: str = "auto"  # none | compile (torch.compile) | liger | auto (on a GPU: liger, compile in a long run)
    # mlp: of the language layers; full: use_grad_checkpoint_llm, and use_grad_checkpoint where the tower trains
    recompute: str = "none"  # none | mlp | full | auto (the first of them that fits the GPU; none on a CPU)
    # fsdp: weights, gradients and moments are split over the ranks, for models that one GPU does not hold
    parallel: str = "ddp"  # how ranks work together: ddp (every rank holds the model) | fsdp
    shard_over: str = "world"  # with fsdp: world = over all ranks; node = inside each node, copies over nodes
    resume_ckpt_path: str | None = None  # a checkpoint directory, or 'auto'
    save_every: int | None = None  # iterations; absent = once per epoch
    keep_last: int = 3  # newest checkpoints that stay, besides best; 0 keeps all
    evaluate: bool = False  # validate only
    valid: ValidConfig = field(default_factory=ValidConfig)  # measurements on the held-out parts
    sanity: str = "raise"  # what a failed check of labels and first loss does: raise | warn | off
    log_freq: int = 10  # iterations between two lines of the log
    device: str = "auto"  # auto (a GPU when there is one) | cuda | cpu
    distributed: bool = True  # False refuses to run as one of several processes
    dist_url: str = "env://"  # where ranks meet; env:// = as the launcher says
    dist_timeout: float = 1800.0  # seconds that ranks wait for each other; then the run ends and names the silent ones
    trackers: list[str] = field(default_factory=lambda: ["terminal", "jsonl"])  # terminal | jsonl | wandb | tensorboard
    report: bool = True  # a run that has ended writes report.html into its job folder
    plugins: list[str] = field(default_factory=list)  # modules of your own that register names
    name: str = ""  # label of an evaluation
    save_path: str = ""  # where evaluation scripts write

    def __post_init__(self) -> None:
        for key in ("max_epoch", "accum_grad_iters", "log_freq", "row_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} must be >= 1, got {getattr(self, key)}")
        if self.dist_timeout <= 0:
            raise ConfigError(f"dist_timeout must be > 0 seconds, got {self.dist_timeout}")
        if self.mix_temperature is not None and not 0.0 <= self.mix_temperature <= 1.0:
            raise ConfigError(f"mix_temperature must be in 0..1, got {self.mix_temperature}")
        if self.iters_per_epoch is not None and self.iters_per_epoch < 1:
            raise ConfigError(f"iters_per_epoch must be >= 1, got {self.iters_per_epoch}")
        for key, allowed in (
            ("precision", ("auto", "fp32", "bf16", "fp16")),
            ("packing", ("auto", "packed", "padded")),
            ("packing_backend", ("auto", "varlen", "flex", "mask", "per_sample")),
            ("fused_layers", ("auto", "none", "compile", "liger")),
            ("recompute", ("none", "mlp", "full", "auto")),
            ("parallel", ("ddp", "fsdp")),
            ("shard_over", ("world", "node")),
            ("sanity", ("raise", "warn", "off")),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}; got '{getattr(self, key)}'")
        if self.shard_over != "world" and self.parallel != "fsdp":
            raise ConfigError(f"shard_over {self.shard_over} needs parallel: fsdp; got parallel {self.parallel}")


@dataclass(frozen=True)
class Config:
    """A whole file, checked. ``datasets`` keeps the order of the YAML."""

    model: ModelConfig
    datasets: dict[str, DatasetConfig]
    run: RunConfig
    evaluation_datasets: dict[str, dict[str, Any]] = field(default_factory=dict)  # for evaluation scripts
