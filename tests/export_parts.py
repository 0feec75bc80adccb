"""Exports of the tiny recorded models, made once per session: (case, target) -> folder."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minigpt4 import catalog
from minigpt4.chat.loading import Assistant
from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.config import dump_config
from minigpt4.common.schema import Config, ModelConfig, RunConfig
from minigpt4.export.run import TARGETS, Wishes, export
from minigpt4.export.source import Source, open_source
from minigpt4.models.base_model import BaseModel
from tests.golden_cases import build_model, load_case

VICUNA, LLAMA2, V2 = "a_minigpt4_qformer_vicuna", "b_minigpt4_noqformer_llama2", "c_minigptv2_lora_instruction"
APPLICABLE = [
    (VICUNA, "pth"), (VICUNA, "merged"), (VICUNA, "hf"), (VICUNA, "blip2"),
    (LLAMA2, "pth"), (LLAMA2, "merged"), (LLAMA2, "hf"),
    (V2, "pth"), (V2, "peft"), (V2, "merged"), (V2, "hf"),
]  # fmt: skip
MANIFEST = {
    "data": {"faces": {"samples": 12, "sample_ratio": 3, "batch_size": 2, "fingerprint": "1f2e3d"}},
    "metrics": {"loss": 1.25, "val_loss": 1.5},
    "iteration": 6,
    "seed": 7,
}


class Exports:
    """Checkpoints and exports below one folder; nothing is made twice."""

    def __init__(self, root: Path) -> None:
        catalog.load()
        self.root = root
        self.source = cache(self._source)
        self.assistant = cache(self._assistant)
        self.model = cache(self._model)
        self.checkpoint = cache(self._checkpoint)
        self.folder = cache(self._folder)

    def _source(self, case: str) -> Source:
        return open_source(str(self.checkpoint(case)), None)

    def _assistant(self, case: str) -> Assistant:
        return self.source(case).load()

    def _model(self, case: str) -> BaseModel:
        return build_model(load_case(case))

    def _checkpoint(self, case: str) -> Path:
        model = self.model(case)
        questions = "blip_caption" if case == V2 else "identity"
        cfg = replace(model.cfg, model_type="pretrain_llama2") if case == LLAMA2 else model.cfg
        return write_checkpoint(self.root / case, cfg, model.trainable_state(), questions)

    def _folder(self, case: str, target: str) -> Path:
        out = self.root / f"{case}_{target}"
        export(self.source(case), TARGETS[target], Wishes(out))
        return out


def write_checkpoint(job: Path, cfg: ModelConfig, weights: dict[str, Tensor], questions: str = "identity") -> Path:
    """A weights-only checkpoint of a job that trained on 12 faces."""
    run = RunConfig(job_name="my_faces", iters_per_epoch=3)
    return save_checkpoint(
        job / "checkpoints",
        3,
        weights=weights,
        config_text=dump_config(Config(model=cfg, datasets={}, run=run)),
        manifest={**MANIFEST, "question_processor": questions},
        resume=None,
        keep_last=1,
    )


def leftovers(folder: Path) -> list[str]:
    """Drafts and replaced exports that should be gone."""
    return sorted(path.name for path in folder.iterdir() if ".writing-" in path.name or ".old-" in path.name)


def perturbed(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same tensors, one of them a little off."""
    assert name in tensors, sorted(tensors)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensors[name].shape, generator=generator) * tensors[name].float().std().clamp(min=0.1)
    return {**tensors, name: tensors[name] + 0.1 * noise}
