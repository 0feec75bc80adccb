"""The reference's own train and eval files load as they are: every key of theirs, in their structure."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from minigpt4 import catalog
from minigpt4.common.config import load_config

RUN = {
    "task": "image_text_pretrain", "lr_sched": "linear_warmup_cosine_lr", "weight_decay": 0.05, "num_workers": 4,
    "seed": 42, "output_dir": "output/x", "amp": True, "resume_ckpt_path": None, "evaluate": False,
    "train_splits": ["train"], "device": "cuda", "world_size": 1, "dist_url": "env://", "distributed": True,
    "wandb_log": True, "job_name": "x",
}  # fmt: skip
STAGE1 = {"init_lr": 1e-4, "min_lr": 8e-5, "warmup_lr": 1e-6, "warmup_steps": 5000, "iters_per_epoch": 5000}
STAGE2 = {"init_lr": 3e-5, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 200, "iters_per_epoch": 200}
V2 = {"init_lr": 1e-5, "min_lr": 1e-6, "warmup_lr": 1e-6, "warmup_steps": 1000, "iters_per_epoch": 1000}
FACES = {**V2, "init_lr": 3e-5, "iters_per_epoch": 640, "accum_grad_iters": 8, "max_epoch": 200, "seed": 43}
VICUNA, LLAMA, CHAT = "###Human: {} ###Assistant: ", "[INST] {} [/INST] ", "[INST] {} [/INST]"
MIXTURE = {
    "multitask_conversation": (50, 2), "llava_conversation": (30, 2), "unnatural_instruction": (10, 1),
    "refvg": (40, 6), "llava_detail": (20, 4), "llava_reason": (80, 4), "flickr_grounded_caption": (80, 2),
    "flickr_CaptionToPhrase": (80, 2), "flickr_ObjectToPhrase": (80, 2), "coco_caption": (10, 6),
    "textcaps_caption": (30, 6), "refcoco": (25, 6), "refcocop": (25, 6), "refcocog": (25, 6), "invrefcoco": (10, 6),
    "invrefcocop": (10, 6), "invrefcocog": (10, 6), "coco_vqa": (15, 6), "ok_vqa": (8, 6), "aok_vqa": (12, 6),
    "gqa": (50, 6), "ocrvqa": (30, 6),
}  # fmt: skip


def _dataset(size: int, ratio: int | None, batch_size: int) -> dict[str, Any]:
    block = {
        "batch_size": batch_size,
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": size}},
        "text_processor": {"train": {"name": "blip_caption"}},
    }
    return block if ratio is None else {**block, "sample_ratio": ratio}


def _sets(size: int, sets: dict[str, tuple[int | None, int]]) -> dict[str, Any]:
    return {name: _dataset(size, *numbers) for name, numbers in sets.items()}


def _v2(**changes: Any) -> dict[str, Any]:
    model = {
        "arch": "minigpt_v2", "model_type": "pretrain", "max_txt_len": 1024, "image_size": 448, "end_sym": "</s>",
        "llama_model": "llm", "ckpt": "start.pth", "use_grad_checkpoint": True, "chat_template": True, "lora_r": 64,
        "lora_alpha": 16, "prompt_template": CHAT,
    }  # fmt: skip
    return {**model, **changes}


ALIGN = {"cc_sbu_align": (None, 12)}
SHARDS = {"laion": (115, 64), "cc_sbu": (14, 64)}
FACE_SETS = {"sharegpt_detail": (30, 1), "gpt4visionface_detail": (10, 1), "RealisticEmotions_detail": (20, 1)}
TRAIN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "minigpt4_stage1_pretrain": (
        {"arch": "minigpt4", "model_type": "pretrain_vicuna0"},
        _sets(224, SHARDS),
        {**STAGE1, "max_epoch": 4},
    ),
    "minigpt4_llama2_stage1_pretrain": (
        {"arch": "minigpt4", "model_type": "pretrain_llama2"},
        _sets(224, SHARDS),
        {**STAGE1, "max_epoch": 4},
    ),
    "minigpt4_stage2_finetune": (
        {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "max_txt_len": 160, "end_sym": "###",
         "prompt_path": "prompts/alignment.txt", "prompt_template": VICUNA, "ckpt": "start.pth"},
        _sets(224, ALIGN),
        {**STAGE2, "max_epoch": 5},
    ),
    "minigpt4_llama2_stage2_finetune": (
        {"arch": "minigpt4", "model_type": "pretrain_llama2", "max_txt_len": 160, "end_sym": "</s>",
         "prompt_path": "prompts/alignment.txt", "prompt_template": LLAMA, "ckpt": "start.pth"},
        _sets(224, ALIGN),
        {**STAGE2, "max_epoch": 5},
    ),
    "minigptv2_finetune": (_v2(), _sets(448, dict(MIXTURE)), {**V2, "max_epoch": 50, "num_workers": 6}),
    "minigpt4_stage2_finetune_gpt4vision": (
        {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "max_txt_len": 300, "end_sym": "###",
         "prompt_path": "prompts/alignment.txt", "prompt_template": VICUNA, "ckpt": "start.pth"},
        _sets(224, {"gpt4affectnet": (1, 12), "shregptdataset": (1, 12)}),
        {**STAGE2, "max_epoch": 5},
    ),
    "minigptv2_finetune_gpt4vision_Full": (_v2(max_txt_len=3072), _sets(448, dict(FACE_SETS)), FACES),
}  # fmt: skip
EVAL: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "minigpt4_eval": (
        {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "max_txt_len": 160, "end_sym": "###",
         "low_resource": True, "prompt_template": VICUNA, "ckpt": "start.pth"},
        224,
        {},
    ),
    "minigpt4_llama2_eval": (
        {"arch": "minigpt4", "model_type": "pretrain_llama2", "max_txt_len": 160, "end_sym": "</s>",
         "low_resource": True, "prompt_template": LLAMA, "ckpt": "start.pth"},
        224,
        {},
    ),
    "minigptv2_eval": (_v2(max_txt_len=500, low_resource=True), 448, {}),
    "minigptv2_benchmark_evaluation": (
        _v2(max_txt_len=500, low_resource=False),
        448,
        {name: {"eval_file_path": "files", "img_path": "images", "max_new_tokens": 20, "batch_size": 10}
         for name in ("refcoco", "refcoco+", "refcocog", "gqa", "okvqa", "vizwiz", "iconvqa", "vsr", "hm")},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders where a user has put them."""
    catalog.load()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    (tmp_path / "llm").mkdir()
    (tmp_path / "start.pth").touch()


def _write(folder: Path, content: dict[str, Any]) -> Path:
    content["model"].setdefault("llama_model", "llm")
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TRAIN)
def test_a_training_file_of_the_reference_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    model, datasets, run = TRAIN[name]
    path = _write(tmp_path, {"model": dict(model), "datasets": datasets, "run": {**RUN, **run}})
    with caplog.at_level(logging.WARNING):
        cfg = load_config(path, check_data=False)
    assert len(cfg.datasets) == len(datasets)
    assert cfg.run.precision == "auto" and "wandb" in cfg.run.trackers
    size = 448 if model["arch"] == "minigpt_v2" else 224
    assert cfg.model.image_size == size
    told = [record.getMessage() for record in caplog.records]
    for key in ("run.amp", "run.wandb_log", "run.world_size", "run.train_splits", "vis_processor.train.image_size"):
        assert sum(key in line for line in told) == 1, key
    assert len(told) == 5 + 2 * ("gpt4affectnet" in datasets)


@pytest.mark.parametrize("name", EVAL)
def test_an_evaluation_file_of_the_reference_loads(tmp_path: Path, name: str) -> None:
    model, size, benchmarks = EVAL[name]
    processor = {"vis_processor": {"train": {"name": "blip2_image_eval", "image_size": size}},
                 "text_processor": {"train": {"name": "blip_caption"}}}  # fmt: skip
    content = {"model": dict(model), "datasets": {"cc_sbu_align": processor}, "run": {"task": "image_text_pretrain"}}
    if benchmarks:
        content |= {"evaluation_datasets": benchmarks}
        content["run"] |= {"name": "minigptv2_evaluation", "save_path": "results"}
    cfg = load_config(_write(tmp_path, content), check_data=False)
    assert cfg.model.end_sym == model["end_sym"] and cfg.model.image_size == size
    assert list(cfg.evaluation_datasets) == list(benchmarks)
