"""Files written for MiniGPT-4, MiniGPT-v2 and the first MiniGPTFace still load, and say what changed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import ModelConfig, RunConfig
from tests.config_fakes import BASE, register_fakes, write


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small registered classes and a folder with one model and one data set."""
    register_fakes(monkeypatch, tmp_path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("old", "new", "warning"),
    [
        ("lora_r: 8", "prompt: ''", "face.yaml:4: model.prompt: ignored: it never had an effect"),
        ("lora_r: 8", "load_finetuned: False", "face.yaml:4: model.load_finetuned: ignored: model.ckpt alone"),
        ("lora_r: 8", "pretrained: x", "face.yaml:4: model.pretrained: ignored: use model.ckpt"),
        ("lora_r: 8", "finetuned: x", "face.yaml:4: model.finetuned: ignored: use model.ckpt"),
        (
            "lora_r: 8",
            "has_qformer: False",
            "face.yaml:4: model.has_qformer: ignored: this architecture has no Q-Former",
        ),
        ("lora_r: 8", "device_8bit: 0", "face.yaml:4: model.device_8bit: ignored: quantised weights go to the device"),
        ("max_epoch: 2", "world_size: 1", "face.yaml:13: run.world_size: ignored: the launcher"),
        ("max_epoch: 2", "use_dist_eval_sampler: True", "face.yaml:13: run.use_dist_eval_sampler: ignored: every held"),
        ("max_epoch: 2", "train_splits: ['train']", "face.yaml:13: run.train_splits: ignored: every data set trains"),
        ("max_epoch: 2", "valid_splits: ['val']", "face.yaml:13: run.valid_splits: ignored: what is held out is named"),
        ("max_epoch: 2", "test_splits: []", "face.yaml:13: run.test_splits: ignored: what is held out is named"),
        ("max_epoch: 2", "wandb_log: False", "face.yaml:13: run.wandb_log: read as run.trackers: [terminal, jsonl]"),
        ("batch_size: 2", "type: default", "face.yaml:10: datasets.faces.type: ignored: a data set has one variant"),
        (
            "batch_size: 2",
            "vis_processor: {train: {min_scale: 0.5}}",
            "face.yaml:10: datasets.faces.vis_processor.train.min_scale: ignored: pictures are not cropped",
        ),
        ("max_epoch: 2", "rank: 0", "face.yaml:13: run.rank: ignored: the launcher"),
        ("max_epoch: 2", "dist_backend: nccl", "face.yaml:13: run.dist_backend: ignored: nccl on GPUs"),
        ("run:", "preprocess: {vis_processor: {}}\nrun:", "face.yaml:12: preprocess: ignored: processors are chosen"),
        ("run:", "env: {cache_root: /x}\nrun:", "face.yaml:12: env: ignored: relative paths start at"),
        ("llama_model: llm_dir", "llm: llm_dir", "face.yaml:3: model.llm: read as model.llama_model"),
        ("lora_r: 8", "init_from: faces.json", "face.yaml:4: model.init_from: read as model.ckpt"),
        ("max_epoch: 2", "amp: True", "face.yaml:13: run.amp: read as run.precision: auto"),
        ("max_epoch: 2", "amp: False", "face.yaml:13: run.amp: read as run.precision: fp32"),
        (
            "max_epoch: 2",
            "wandb_log: True",
            "face.yaml:13: run.wandb_log: read as run.trackers: [terminal, jsonl, wandb]",
        ),
    ],
)
def test_an_old_key_loads_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str, warning: str
) -> None:
    load_config(write(tmp_path, BASE.replace(old, new)))
    (line,) = warnings(caplog)
    assert line.startswith(warning)


def test_upgraded_values_arrive(tmp_path: Path) -> None:
    text = BASE.replace("llama_model: llm_dir", "llm: llm_dir\n  init_from: faces.json").replace(
        "max_epoch: 2", "amp: True"
    )
    cfg = load_config(write(tmp_path, text), ["run.wandb_log=True", "run.trackers=[jsonl]"])
    assert cfg.model.llama_model == str(tmp_path / "llm_dir") and cfg.model.ckpt == str(tmp_path / "faces.json")
    assert (cfg.run.precision, cfg.run.trackers) == ("auto", ["jsonl", "wandb"])
    assert load_config(write(tmp_path, BASE), ["run.amp=False"]).run.precision == "fp32"


def test_precision_wins_over_amp(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_config(write(tmp_path, BASE), ["run.amp=True", "run.precision=bf16"])
    assert cfg.run.precision == "bf16"
    assert warnings(caplog) == ["--options: run.amp: ignored: run.precision is given"]


def test_names_of_data_sets_that_were_never_registered_mean_the_face_sets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config(write(tmp_path, BASE.replace("  faces:", "  gpt4affectnet: {batch_size: 12}\n  faces:")))
    assert list(cfg.datasets) == ["gpt4visionface_detail", "faces"]
    assert cfg.datasets["gpt4visionface_detail"].batch_size == 12
    assert warnings(caplog) == ["face.yaml:6: datasets.gpt4affectnet: read as datasets.gpt4visionface_detail"]


def test_an_alias_that_a_mistake_follows_keeps_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^face.yaml:3: model.llama_model: 'gone' not found"):
        load_config(write(tmp_path, BASE.replace("llama_model: llm_dir", "llm: gone")))


def test_a_key_that_stands_in_every_data_set_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = BASE.replace("run:", f"  known:{DATASET}run:").replace("batch_size: 2", "batch_size: 2\n    type: default")
    load_config(
        write(
            tmp_path, text.replace("on_error: skip", "sample_ratio: 1").replace("llm_dir", "llm_dir\n  image_size: 448")
        )
    )
    assert warnings(caplog) == [
        "face.yaml:12: datasets.faces.type: ignored (and 1 more): a data set has one variant",
        "face.yaml:20: datasets.known.vis_processor.train.image_size: ignored (and 1 more): it is model.image_size",
        "face.yaml:20: datasets.known.vis_processor.train.min_scale: ignored: pictures are not cropped",
        "face.yaml:20: datasets.known.vis_processor.train.max_scale: ignored: pictures are not cropped",
    ]


def test_keys_that_still_mean_something_are_taken_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_config(write(tmp_path, BASE + "  dist_url: 'env://'\n  distributed: True\n  evaluate: False\n"))
    assert warnings(caplog) == []


MODEL_KEYS = {
    "model_type": "pretrain", "vit_model": "eva_clip_g", "image_size": 448, "drop_path_rate": 0,
    "use_grad_checkpoint": True, "vit_precision": "fp16", "freeze_vit": True, "has_qformer": True,
    "freeze_qformer": True, "num_query_token": 32, "q_former_model": "https://example.org/q.pth",
    "prompt_path": "", "prompt_template": "[INST] {} [/INST]", "max_txt_len": 300, "max_context_len": 3800,
    "end_sym": "</s>", "low_resource": False, "device_8bit": 0, "lora_r": 64, "lora_alpha": 16,
    "chat_template": True, "use_grad_checkpoint_llm": True, "ckpt": "", "prompt": "", "load_finetuned": False,
    "finetuned": "", "pretrained": "",
}  # fmt: skip
RUN_KEYS = {
    "task": "image_text_pretrain", "runner": "runner_base", "lr_sched": "linear_warmup_cosine_lr", "init_lr": 1e-5,
    "min_lr": 1e-6, "warmup_lr": 1e-6, "warmup_steps": 1000, "lr_decay_rate": None, "weight_decay": 0.05,
    "beta2": 0.999, "max_epoch": 50, "iters_per_epoch": 1000, "accum_grad_iters": 1, "num_workers": 6, "seed": 42,
    "output_dir": "output", "amp": True, "resume_ckpt_path": None, "evaluate": False, "train_splits": ["train"],
    "valid_splits": [], "test_splits": [], "log_freq": 50, "use_dist_eval_sampler": True, "device": "cuda",
    "world_size": 1, "dist_url": "env://", "distributed": True, "rank": 0, "gpu": 0, "dist_backend": "nccl",
    "wandb_log": True, "job_name": "x", "name": "x", "save_path": "x",
}  # fmt: skip
DATASET = """
    type: default
    data_type: images
    batch_size: 6
    sample_ratio: 50
    vis_processor:
      train: {name: eyes, image_size: 448, mean: null, std: null, min_scale: 0.5, max_scale: 1.0}
      eval: {name: eyes, image_size: 448}
    text_processor:
      train: {name: eyes, prompt: "", max_words: 50}
      eval:
    build_info: {ann_path: faces.json, image_path: .}
"""


def test_every_key_of_the_first_versions_is_accepted_at_once(tmp_path: Path) -> None:
    model = "".join(f"  {key}: {value!r}\n" for key, value in MODEL_KEYS.items())
    run = "".join(f"  {key}: {'null' if value is None else repr(value)}\n" for key, value in RUN_KEYS.items())
    text = f"model:\n  arch: minigpt_v2\n  llama_model: llm_dir\n{model}datasets:\n  known:{DATASET}run:\n{run}"
    cfg = load_config(write(tmp_path, text + "preprocess: {}\nevaluation_datasets: {vsr: {batch_size: 10}}\n"))
    assert isinstance(cfg.model, ModelConfig) and isinstance(cfg.run, RunConfig)
    assert cfg.model.lora_r == 64 and cfg.run.lr_decay_rate is None and cfg.run.precision == "auto"
    assert cfg.datasets["known"].text_processor.train.max_words == 50
