"""A model, a data set and a configuration small enough to train in milliseconds, registered as ``tiny_engine``.

The model is token-wise (no attention), so what a sample contributes does not depend on the rows around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4 import catalog
from minigpt4.common.dist import DistContext
from minigpt4.common.optim import build_optimizer
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, DatasetConfig, ModelConfig, RunConfig, ValConfig, ValidConfig
from minigpt4.common.types import IGNORE_INDEX, IMAGE_PROMPT, IMAGE_TOKEN, Batch, Encoded, Sample, Turn, as_floats
from minigpt4.conversation.encoding import Encoder
from minigpt4.datasets.balance import Groups, group_records
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.losses import LossOutput
from minigpt4.tasks.base_task import Training
from minigpt4.tasks.image_text_pretrain import ImageTextPretrainTask

catalog.load()
CPU = torch.device("cpu")
SIZE = 4
TASK = ImageTextPretrainTask()


class LetterTokenizer:
    """One id per byte."""

    bos_id: int | None = 1
    eos_id = 2
    pad_id = 0
    vocab_size = 128
    end_ids = (2,)
    special: Mapping[str, int] = MappingProxyType({})

    def encode(self, text: str) -> list[int]:
        return [min(ord(letter), 127) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i > 2)

    def spell(self, ids: Sequence[int]) -> str:
        return "".join({1: "<s>", 2: "</s>"}.get(i, chr(i)) for i in ids)


@dataclass(frozen=True)
class TinyConfig(ModelConfig):
    arch: str = "tiny_engine"
    image_size: int = SIZE
    dropout: float = 0.0


@registry.register("model", "tiny_engine")
class TinyModel(nn.Module):
    Config: ClassVar[type[ModelConfig]] = TinyConfig
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    attends_by_sample = False
    load_reports: ClassVar[list[Any]] = []
    keeps_samples_apart = True

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert isinstance(cfg, TinyConfig)
        self.cfg = cfg
        self.encoder = Encoder(LetterTokenizer(), num_image_tokens=1, max_txt_len=cfg.max_txt_len)
        self.vision = nn.Linear(3 * SIZE * SIZE, 12).requires_grad_(False)
        self.embedding = nn.Embedding(128, 12).requires_grad_(False)
        self.projection = nn.Linear(12, 12)
        self.mix = nn.Linear(12, 24)
        self.dropout = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(24, 128)

    @classmethod
    def from_config(cls, cfg: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> TinyModel:
        torch.manual_seed(seed)
        return cls(cfg).to(device)

    def forward(self, batch: Batch) -> LossOutput:
        image = batch.input_ids == IMAGE_TOKEN
        images = batch.images if batch.image_order is None else batch.images[batch.image_order]
        features = self.projection(self.vision(images.flatten(1))) if len(images) else None
        hidden = self.embedding(batch.input_ids.clamp(min=0))
        if features is None:
            hidden = hidden + 0 * sum(p.sum() for p in self.projection.parameters())
        else:
            hidden = hidden.masked_scatter(image[..., None], features)
            # what a token reads of the image: the sum over its row's images (padded rows hold one sample each)
            hidden = hidden + (hidden * image[..., None]).sum(1, keepdim=True)
        hidden = self.dropout(torch.tanh(self.mix(hidden)))[:, :-1]
        targets = batch.labels[:, 1:]
        losses = functional.cross_entropy(
            self.head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view_as(targets)
        return LossOutput(losses.sum(), losses.sum(1), int((targets != IGNORE_INDEX).sum()))

    @torch.no_grad()
    def generate(self, prompts: Sequence[Encoded], images: Tensor, options: GenerateOptions) -> list[str]:
        """One letter that depends on the weights and on the prompt: the likeliest word after it."""
        bias = self.head(torch.tanh(self.mix(self.embedding(torch.tensor([prompt.ids[-2] for prompt in prompts])))))
        return [chr(int(best)) for best in bias.argmax(-1)]

    def trainable_parameters_by_name(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.trainable_parameters_by_name()}

    def load_weights(self, state: Mapping[str, Tensor], source: str, complete: bool = False) -> None:
        with torch.no_grad():
            for name, parameter in self.trainable_parameters_by_name():
                parameter.copy_(state[name])


@dataclass
class TinyDataset:
    """Letters from a seeded draw; images and lengths differ per record."""

    name: str
    cfg: DatasetConfig
    size: int

    def __len__(self) -> int:
        return self.size

    def groups(self) -> Groups | None:
        if not self.cfg.balance.by:
            return None
        return group_records([str(min(index, 3)) for index in range(self.size)], self.cfg.balance.temperature)

    def sample(self, pass_index: int, index: int, seed: int) -> Sample:
        draw = Random(f"{seed}/{self.name}/{pass_index}/{index}")
        answer = "".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 12)))
        image = torch.full((3, SIZE, SIZE), draw.uniform(-1, 1))
        return Sample((Turn(f"{IMAGE_PROMPT} say {index} ", answer),), (image,), f"{self.name}/{index}")

    def facts(self, index: int) -> dict[str, Any]:
        return {"images": [], "section": f"part {index % 2}", "meta": {"age": "old" if index % 3 else "young"}}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name}{self.size}".encode()).hexdigest()[:16]


@registry.register("builder", "tiny_engine")
class TinyBuilder:
    Config: ClassVar[type[DatasetConfig]] = DatasetConfig

    def __init__(self, cfg: DatasetConfig, image: Any, default_prompts: Sequence[str] = ()) -> None:
        self._cfg = cfg

    def check(self) -> list[str]:
        return []

    def build(self, split: str) -> TinyDataset:
        return TinyDataset(self._cfg.name, self._cfg, self._cfg.build_info["size"] if split == "train" else 5)


def tiny_config(folder: Path, dropout: float = 0.0, with_val: bool = False, **run: Any) -> Config:
    """Two data sets of 14 and 9 records; 2 epochs of 4 windows of 2 micro-batches unless ``run`` says otherwise.

    ``valid`` may be a mapping of the keys of ``run.valid``.
    """
    val = ValConfig(fraction=0.2) if with_val else ValConfig()
    one = DatasetConfig(
        name="one", builder="tiny_engine", build_info={"size": 14}, batch_size=3, sample_ratio=2.0, val=val
    )
    two = replace(one, name="two", build_info={"size": 9}, batch_size=2, sample_ratio=1.0, val=ValConfig())
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "job_name": "tiny",
        "max_epoch": 2,
        "iters_per_epoch": 8,
        "accum_grad_iters": 2,
        "init_lr": 1e-2,
        "warmup_steps": 4,
        "warmup_lr": 1e-4,
        "log_freq": 1,
        "device": "cpu",
        "trackers": ["jsonl"],
        "sanity": "off",  # the weights are random
        **run,
    }
    if isinstance(settings.get("valid"), dict):
        settings["valid"] = ValidConfig(**settings["valid"])
    return Config(TinyConfig(dropout=dropout), {"one": one, "two": two}, RunConfig(**settings))


def padded(samples: Sequence[Sample], encoder: Encoder) -> Batch:
    """Right-padded rows, one per sample."""
    encoded = [encoder.encode_turns(sample.turns) for sample in samples]
    longest = max(len(one.ids) for one in encoded)
    return Batch(
        torch.tensor([one.ids + [0] * (longest - len(one.ids)) for one in encoded]),
        torch.tensor([list(range(len(one.ids))) + [0] * (longest - len(one.ids)) for one in encoded]),
        torch.tensor([one.labels + [IGNORE_INDEX] * (longest - len(one.ids)) for one in encoded]),
        torch.stack([as_floats(image) for sample in samples for image in sample.images]),
        tuple(len(one.ids) for one in encoded),
        sum(label != IGNORE_INDEX for one in encoded for label in one.labels),
        tuple(sample.sample_id for sample in samples),
    )


@dataclass
class Bench:
    """A model and what one step of it needs, without a runner."""

    folder: Path
    accumulation: int = 1
    dropout: float = 0.0
    clip: float = 0.0
    lr: float = 1e-2
    model: TinyModel = field(init=False)
    training: Training = field(init=False)

    def __post_init__(self) -> None:
        self.model = TinyModel.from_config(TinyConfig(dropout=self.dropout), CPU, torch.float32, seed=1)
        named = self.model.trainable_parameters_by_name()
        self.training = Training(
            model=self.model,
            core=self.model,
            optimizer=build_optimizer(named, RunConfig(init_lr=self.lr), CPU),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            lr_at=lambda t: self.lr,
            dist=DistContext(0, 1, 0, CPU),
            accumulation=self.accumulation,
            clip_grad_norm=self.clip,
            seed=7,
            job_dir=self.folder,
            stop_requested=lambda: False,
        )

    def batch(self, *indices: int) -> Batch:
        dataset = TinyDataset("one", DatasetConfig(), 100)
        return padded([dataset.sample(0, index, 3) for index in indices], self.model.encoder)
