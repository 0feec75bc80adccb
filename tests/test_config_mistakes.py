"""Every kind of mistake in a YAML file is one line that names file, line, key, what was found and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.cli import train_command
from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError
from tests.config_fakes import BASE, REPOSITORY, register_fakes, write

pytestmark = pytest.mark.usefixtures("fakes")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small registered classes and a folder with one model and one data set."""
    register_fakes(monkeypatch, tmp_path)
    monkeypatch.setattr("minigpt4.catalog.load", lambda: None)  # the real names stay out


def lines(path: Path, options: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    return str(caught.value).splitlines()


# (id, text to replace in BASE, replacement, place, words that the one line must hold)
MISTAKES: list[tuple[str, str, str, str, list[str]]] = [
    (
        "unknown model key",
        "lora_r: 8",
        "lora_rr: 8",
        ":4: model.lora_rr:",
        ["unknown key", "'lora_r'", "keys: docs/CONFIG_REFERENCE.md"],
    ),
    (
        "unknown run key",
        "max_epoch: 2",
        "warmup_step: 2",
        ":13: run.warmup_step:",
        ["'warmup_steps'", "docs/CONFIG_REFERENCE.md"],
    ),
    ("unknown data set key", "batch_size: 2", "batchsize: 2", ":10: datasets.faces.batchsize:", ["'batch_size'"]),
    ("unknown nested key", "batch_size: 2", "vis_processor: {train: {nam: x}}", "vis_processor.train.nam:", ["'name'"]),
    (
        "key far from all others",
        "lora_r: 8",
        "zzz: 8",
        ":4: model.zzz:",
        ["unknown key; all", "docs/CONFIG_REFERENCE.md"],
    ),
    ("text for an integer", "max_epoch: 2", "max_epoch: fifty", ":13: run.max_epoch:", ["'fifty'", "an integer"]),
    ("fraction for an integer", "max_epoch: 2", "max_epoch: 1.5", "run.max_epoch:", ["1.5", "an integer"]),
    ("true for an integer", "max_epoch: 2", "max_epoch: true", "run.max_epoch:", ["True (true/false)", "an integer"]),
    ("text for a boolean", "max_epoch: 2", "evaluate: perhaps", "run.evaluate:", ["'perhaps'", "true or false"]),
    ("text for a number", "max_epoch: 2", "init_lr: small", "run.init_lr:", ["'small'", "a number"]),
    ("list for text", "max_epoch: 2", "task: [a]", "run.task:", ["['a'] (list)", "text"]),
    ("text for a list", "max_epoch: 2", "trackers: jsonl", "run.trackers:", ["'jsonl'", "a list of text"]),
    ("list for a mapping", "batch_size: 2", "val: [a]", "datasets.faces.val:", ["['a'] (list)", "a mapping"]),
    ("text for a nested section", "batch_size: 2", "val: 0.1", "datasets.faces.val:", ["0.1", "a mapping"]),
    ("null for an integer", "max_epoch: 2", "max_epoch: null", "run.max_epoch:", ["nothing (null)", "an integer"]),
    ("value out of range", "lora_r: 8", "lora_r: -8", ":4: model.lora_r:", ["must be >= 0", "-8"]),
    (
        "choice not allowed",
        "max_epoch: 2",
        "precision: fp8",
        ":13: run.precision:",
        ["'fp8'", "auto, fp32, bf16, fp16"],
    ),
    (
        "unknown arch",
        "arch: toy",
        "arch: toi",
        ":2: model.arch:",
        ["unknown model 'toi'", "'toy'", "known: minigpt_v2, toy"],
    ),
    (
        "unknown model_type",
        "arch: toy",
        "arch: minigpt_v2\n  model_type: pretrian",
        ":3: model.model_type:",
        ["'pretrain'"],
    ),
    (
        "unknown data set",
        "faces:",
        "gpt4visionface_detial:\n  x:",
        "datasets.gpt4visionface_detial:",
        ["'gpt4visionface_"],
    ),
    (
        "unknown format",
        "format: talk",
        "format: tlak",
        ":8: datasets.faces.format:",
        ["unknown format 'tlak'", "'talk'"],
    ),
    (
        "unknown builder",
        "format: talk",
        "builder: pears",
        ":8: datasets.faces.builder:",
        ["unknown builder", "'pairs'"],
    ),
    (
        "unknown processor",
        "batch_size: 2",
        "vis_processor: {train: {name: eyse}}",
        "train.name:",
        ["'eyes'", "known: eyes"],
    ),
    ("unknown task", "max_epoch: 2", "task: pretrian", ":13: run.task:", ["unknown task 'pretrian'", "'pretrain'"]),
    (
        "unknown runner",
        "max_epoch: 2",
        "runner: slow",
        ":13: run.runner:",
        ["unknown runner 'slow'", "known: runner_base, steady"],
    ),
    ("unknown schedule", "max_epoch: 2", "lr_sched: flatt", ":13: run.lr_sched:", ["unknown lr_scheduler", "'flat'"]),
    (
        "unknown tracker",
        "max_epoch: 2",
        "trackers: [wand]",
        ":13: run.trackers:",
        ["'wand'", "'wandb'", "known: terminal"],
    ),
    ("missing plugin", "max_epoch: 2", "plugins: [no_such_module_xyz]", ":13: run.plugins:", ["no_such_module_xyz"]),
    (
        "missing language model",
        "llm_dir",
        "llm_dri",
        ":3: model.llama_model:",
        ["'llm_dri' not found", "looked in", "org/name"],
    ),
    ("empty language model", "llm_dir", "''", ":3: model.llama_model:", ["is empty", "org/name"]),
    ("language model is a file", "llm_dir", "faces.json", ":3: model.llama_model:", ["is a file", "directory"]),
    ("missing checkpoint", "lora_r: 8", "ckpt: none.pth", ":4: model.ckpt:", ["'none.pth' not found", "looked in"]),
    ("missing vision tower", "lora_r: 8", "vit_weights: /nowhere/x.pth", ":4: model.vit_weights:", ["/nowhere/x.pth"]),
    ("missing resume", "max_epoch: 2", "resume_ckpt_path: gone", ":13: run.resume_ckpt_path:", ["'gone' not found"]),
    (
        "missing prompts file",
        "batch_size: 2",
        "prompts_file: p.txt",
        "datasets.faces.prompts_file:",
        ["'p.txt' not found"],
    ),
    ("prompt file without image", "lora_r: 8", "prompt_path: faces.json", ":4: model.prompt_path:", ["<ImageHere>"]),
    (
        "missing annotations",
        "faces.json",
        "faecs.json",
        ":7: datasets.faces.build_info.ann_path:",
        ["faecs.json", "no such file"],
    ),
    ("path/to placeholder", "llm_dir", "/path/to/vicuna", ":3: model.llama_model:", ["placeholder '/path/to/vicuna'"]),
    ("your placeholder", "faces.json", "/your/faces.json", "build_info.ann_path:", ["placeholder '/your/faces.json'"]),
    ("bracket placeholder", "llm_dir", "<weights>", ":3: model.llama_model:", ["placeholder '<weights>'"]),
    (
        "please set placeholder",
        "llm_dir",
        "please set this",
        ":3: model.llama_model:",
        ["placeholder 'please set this'"],
    ),
    ("mandatory placeholder", "max_epoch: 2", "max_epoch: ???", ":13: run.max_epoch:", ["'???'"]),
    ("duplicate key", "lora_r: 8", "lora_r: 8\n  lora_r: 9", ":5: model.lora_r:", ["written twice", "line 4"]),
    ("duplicate section", "run:", "run: {}\nrun:", ":13: run:", ["written twice", "line 12"]),
    (
        "unset variable",
        "llm_dir",
        "${oc.env:NO_SUCH_X}/l",
        ":3: model.llama_model:",
        ["variable NO_SUCH_X", "default}"],
    ),
    ("broken reference", "llm_dir", "'${oc.env:X'", ":3: model.llama_model:", ["'${oc.env:X'"]),
    ("reference to nothing", "llm_dir", "${run.sed}", ":3: model.llama_model:", ["run.sed"]),
    (
        "unknown section",
        "run:",
        "runs: {}\nrun:",
        ": runs:",
        ["unknown section", "'run'", "allowed: model, datasets, run"],
    ),
    ("key without section", "run:", "seed: 1\nrun:", ": seed:", ["unknown section", "'run.seed'"]),
    ("section is a list", "run:\n  max_epoch: 2", "run: [1]", ":12: run:", ["[1]", "expected a mapping"]),
    ("data set is text", "run:", "  more: text\nrun:", ":12: datasets.more:", ["'text'", "expected a mapping"]),
    (
        "evaluation set is text",
        "run:",
        "evaluation_datasets: {gqa: x}\nrun:",
        "evaluation_datasets.gqa:",
        ["a mapping"],
    ),
    ("missing section", "run:\n  max_epoch: 2", "", ": run:", ["missing section"]),
    ("ratio on one of two", "run:", "  known: {sample_ratio: 1}\nrun:", ":5: datasets:", ["missing in: faces"]),
    ("all ratios zero", "batch_size: 2", "sample_ratio: 0", ":5: datasets:", ["sample_ratio is 0"]),
    (
        "image size differs",
        "batch_size: 2",
        "vis_processor: {train: {image_size: 3}}",
        ":10: datasets.faces.vis_processor.train.image_size:",
        ["model.image_size is 224"],
    ),
    ("other type", "batch_size: 2", "type: special", ":10: datasets.faces.type:", ["'special'", "allowed: default"]),
    (
        "image size and patches",
        "lora_r: 8",
        "image_size: 225",
        ":4: model.image_size:",
        ["225 is not divisible by the patch size 14", "nearest: 224 or 238"],
    ),
    (
        "image size and own patches",
        "lora_r: 8",
        "vit_config: {patch_size: 10}",
        ": model.image_size:",
        ["224 is not divisible by the patch size 10"],
    ),
    (
        "epoch shorter than a window",
        "max_epoch: 2",
        "iters_per_epoch: 4\n  accum_grad_iters: 8",
        ":13: run.iters_per_epoch:",
        ["an epoch of 4 is shorter than one window of accum_grad_iters 8"],
    ),
    ("unknown template", "lora_r: 8", "chat_format: vicuna", ":4: model.chat_format:", ["'vicuna'", "'vicuna_v0'"]),
    ("template without place", "lora_r: 8", "prompt_template: '[INST]'", ":4: model.prompt_template:", ["'{}' once"]),
    ("int8 and nf4", "lora_r: 8", "low_resource: True\n  load_in_4bit: True", "model.low_resource:", ["exclude"]),
    ("unknown way of checking", "max_epoch: 2", "sanity: loud", ":13: run.sanity:", ["raise, warn, off", "'loud'"]),
    ("unknown metric", "max_epoch: 2", "valid: {metrics: [rogue_l]}", ":13: run.valid.metrics:", ["'rouge_l'", "loss"]),
    ("unknown key of valid", "max_epoch: 2", "valid: {evry: 3}", ":13: run.valid.evry:", ["'every'", "allowed: every"]),
    (
        "nothing to validate on",
        "max_epoch: 2",
        "valid: {every: 3}",
        ":13: run.valid:",
        ["no data set holds anything out"],
    ),
    (
        "best by what is not measured",
        "max_epoch: 2",
        "valid: {best_by: rouge_l}",
        ":13: run.valid:",
        ["best_by 'rouge_l' is none of valid.metrics: loss"],
    ),
    (
        "negative patience",
        "max_epoch: 2",
        "valid: {patience: -1}",
        ":13: run.valid:",
        ["patience must be >= 0, got -1"],
    ),
    (
        "unknown key of a canary",
        "max_epoch: 2",
        "valid: {canaries: [{qestion: x}]}",
        ":13: run.valid.canaries.0.qestion:",
        ["'question'"],
    ),
    (
        "missing picture of a canary",
        "max_epoch: 2",
        "valid: {canaries: [{question: x, image: no.png}]}",
        "run.valid.canaries.0.image:",
        ["'no.png' not found"],
    ),
    (
        "canary without question",
        "max_epoch: 2",
        "valid: {canaries: [{image: ''}]}",
        ":13: run.valid.canaries.0:",
        ["needs a question"],
    ),
    ("canary is text", "max_epoch: 2", "valid: {canaries: [hello]}", "run.valid.canaries.0:", ["'hello'", "question"]),
    ("share out of range", "batch_size: 2", "val: {fraction: 1.5}", ":10: datasets.faces.val:", ["< 1, got 1.5"]),
    (
        "held out twice",
        "batch_size: 2",
        "val: {fraction: 0.1, ann_path: faces.json}",
        ":10: datasets.faces.val:",
        ["exclude each other"],
    ),
    ("wandb_log is text", "max_epoch: 2", "wandb_log: on please", ":13: run.wandb_log:", ["true or false"]),
    ("wrong answer to an error", "on_error: skip", "on_error: ignore", ":11: datasets.faces.on_error:", ["'ignore'"]),
    ("alias beside its key", "lora_r: 8", "llm: llm_dir", ":4: model.llm:", ["another name of 'llama_model'"]),
    ("amp is text", "max_epoch: 2", "amp: half", ":13: run.amp:", ["'half'", "true or false"]),
    ("other name", "batch_size: 2", "name: masks", ":10: datasets.faces.name:", ["'masks'", "'faces'"]),
]


@pytest.mark.parametrize(
    ("old", "new", "place", "words"), [case[1:] for case in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_one_line_with_its_place_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, place: str, words: list[str]
) -> None:
    assert BASE.count(old) == 1
    code = train_command(["--cfg-path", str(write(tmp_path, BASE.replace(old, new)))])
    found = capsys.readouterr().err.splitlines()
    assert code == 2 and len(found) == 1, found
    assert found[0].startswith("error: face.yaml:") and place in found[0], found[0]
    assert not [word for word in words if word not in found[0]], found[0]


def test_there_are_at_least_sixty_kinds_of_mistakes_in_the_table() -> None:
    assert len({case[0] for case in MISTAKES}) >= 60


def test_all_mistakes_of_a_file_come_at_once(tmp_path: Path) -> None:
    text = BASE.replace(
        "lora_r: 8", "lora_rr: 8\n  max_txt_len: many\n  ckpt: /path/to/x\n  lora_r: -1\n  max_context_len: 0"
    )
    found = lines(write(tmp_path, text.replace("max_epoch: 2", "task: tusk\n  max_epoch: 0\n  log_freq: 0")))
    for word in (
        "lora_rr",
        "max_txt_len",
        "model.ckpt",
        "model.lora_r:",
        "max_context_len",
        "tusk",
        "max_epoch",
        "log_freq",
    ):
        assert any(word in line for line in found), (word, found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["face.yaml: holds nothing", "model, datasets, run"]),
        ("- a\n- b\n", ["face.yaml: holds a list", "a mapping"]),
        ("just text\n", ["face.yaml: holds a text", "a mapping"]),
        ("model:\n\tarch: toy\n", ["face.yaml:2: not valid YAML"]),
        ("model: {arch: toy\nrun: {}\n", ["face.yaml:2: not valid YAML"]),
        ("model: !!python/object:os.system x\n", ["face.yaml:1: not valid YAML"]),
        ("model: &a\n  x: *a\n", ["face.yaml:1: model.x: an anchor that contains itself"]),
        ("? [a]\n: 1\n", ["a key must be text, found a list"]),
        (
            "base_model: x\nadapter: lora\ndatasets: [{path: d}]\n",
            ["configuration of another program", "base_model, adapter, datasets", "expected the sections model"],
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    found = lines(write(tmp_path, text))
    assert len(found) == 1 and not [word for word in words if word not in found[0]], found


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, BASE)
    assert lines(tmp_path / "faec.yaml") == ["faec.yaml: no such file (did you mean 'face.yaml'?)"]


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "face.yaml").write_bytes(b"model: \xff\xfe\n")
    assert ["face.yaml: cannot be read as UTF-8 text" in line for line in lines(tmp_path / "face.yaml")] == [True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("run.sed=1",), ["--options: run.sed: unknown key", "'seed'"]),
        (("runn.seed=1",), ["--options: runn: unknown section", "'run'"]),
        (("seed=1",), ["--options: seed: names nothing", "'run.seed'"]),
        (("run.seed=1", "run.max_epoch"), ["--options: run.max_epoch: has no '='"]),
        (("run.seed", "1", "run.max_epoch"), ["--options: run.max_epoch: has no value"]),
        (("run.max_epoch=many",), ["--options: run.max_epoch: found 'many'", "an integer"]),
        (("run.max_epoch.x=1",), ["--options: run.max_epoch.x: names nothing", "run.max_epoch is a int"]),
        (("datasets.masks.batch_size=1",), ["--options: datasets.masks: unknown data set", "build_info and format"]),
        (("datasets.faces.format=tlak",), ["--options: datasets.faces.format: unknown format", "'talk'"]),
        (("model.arch=toi",), ["--options: model.arch: unknown model 'toi'"]),
    ],
)
def test_an_option_that_names_nothing_is_refused(tmp_path: Path, options: tuple[str, ...], words: list[str]) -> None:
    found = lines(write(tmp_path, BASE), options)
    assert len(found) == 1 and not [word for word in words if word not in found[0]], found


def test_train_prints_the_lines_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model:\n  arch: minigpt_v2\n  lora_rr: 3\ndatasets: {}\nrun:\n  warmup_step: 1\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "--cfg-path", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "bad.yaml:3: model.lora_rr: unknown key (did you mean 'lora_r'?)" in output
    assert "bad.yaml:6: run.warmup_step: unknown key (did you mean 'warmup_steps'?)" in output
    assert "Traceback" not in output
