"""The README of an exported folder: what the model is, what it was trained on, how to load it, what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt4.export.parts import dtype_name, has_qformer
from minigpt4.export.source import Source, public_name
from minigpt4.export.target import Facts, Target, base_name

ARCHITECTURES = {"minigpt4": "MiniGPT-4", "minigpt_v2": "MiniGPT-v2"}
_LIMITS = """\
## Intended use and limits

For research on vision-language models, and for descriptions of pictures that a person reads and judges.

- Answers are generated text. They can be wrong, invented, or come from the language model rather than from the picture.
- A face shows an expression, not what somebody feels. Labels of emotion in training data are opinions of annotators.
- Errors are uneven over groups of people: by age, gender, skin tone, culture, disability, and by light and camera.
  Measure them by group on data like yours before you rely on an answer.
- Not for decisions about persons: hiring, grading, credit, insurance, policing, border control, health.
- Laws forbid or restrict the inference of emotions from faces in places, among them work and education in the European
  Union, and biometric data is protected in many countries. Whether your use is allowed is yours to check.
"""
_LICENCES = """\
## Licences

This folder holds or needs weights of the base models above. Their licences go on to apply, also to merged weights, and
may forbid uses or require a notice. The training data have terms of their own. Check them before you share this folder.
"""


def write_card(folder: Path, source: Source, target: Target, facts: Facts, check: str) -> None:
    """``README.md``. check: a sentence on how the files were compared with the model."""
    usage = f"## Loading (`--to {target.name}`)\n\n{target.usage(source, facts)}\n"
    parts = [_front_matter(source, target), _architecture(source, facts), usage, _training(source)]
    parts += [f"## Check\n\n{check}\n", _LIMITS, _LICENCES]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _front_matter(source: Source, target: Target) -> str:
    base = base_name(source)
    library = {"peft": "peft", "pth": "pytorch"}.get(target.name, "transformers")
    task = "image-text-to-text" if target.has_vision or target.name == "pth" else "text-generation"
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {task}", "tags: [vision-language, minigpt-4]"]
    lines += [f"base_model: {base}"] if "/" in base else []  # only a hub id is of use to others
    return "\n".join([*lines, "---", f"\n# {source.title}\n"])


def _architecture(source: Source, facts: Facts) -> str:
    cfg = source.model
    tower = "EVA ViT-g/14 of BLIP-2" if cfg.vit_model == "eva_clip_g" else f"`{cfg.vit_model}` of timm"
    origin = public_name(cfg.vit_weights) if cfg.vit_weights else "published weights"
    between = "Q-Former of BLIP-2" if has_qformer(cfg) else "four neighbouring patches side by side"
    lora = (
        f"rank {cfg.lora_r}, alpha {cfg.lora_alpha}, on {', '.join(cfg.lora_target_modules)}" if cfg.lora_r else "none"
    )
    trained = ", ".join(f"{part} ({count:,} numbers)" for part, count in facts.trained.items())
    rows = {
        "architecture": ARCHITECTURES.get(cfg.arch, cfg.arch),
        "vision tower": f"{tower} ({origin}), {cfg.image_size} x {cfg.image_size} pixels",
        "between": f"{between}, {facts.num_image_tokens} positions per image",
        "language model": base_name(source),
        "LoRA": lora,
        "trained tensors": trained,
        "stored as": dtype_name(facts.dtype)
        + (" (in training and chat the language model was quantised)" if source.is_quantised else ""),
    }
    return _table({"part": "", **rows})


def _training(source: Source) -> str:
    manifest = source.manifest
    if not manifest:
        return "## Training\n\nPublished weights: training is described where they come from.\n"
    lines = ["## Training\n"]
    data: Mapping[str, Mapping[str, Any]] = manifest.get("data") or {}
    if data:
        lines += ["| data set | samples | ratio | batch | fingerprint |", "|---|---:|---:|---:|---|"]
        for name, facts in data.items():
            ratio = facts.get("sample_ratio")
            lines.append(
                f"| {name} | {facts.get('samples', '?')} | {'all' if ratio is None else ratio} | "
                f"{facts.get('batch_size', '?')} | `{facts.get('fingerprint', '?')}` |"
            )
        lines.append("")
    step = source.checkpoint.step if source.checkpoint else "?"
    sentence = f"Optimiser steps: {step}."
    for key, label in (("iteration", "Micro-batches per process"), ("world_size", "Processes"), ("seed", "Seed")):
        if manifest.get(key) is not None:
            sentence += f" {label}: {manifest[key]}."
    lines.append(sentence + f" Questions were processed by `{source.question_processor}`.\n")
    metrics: Mapping[str, Any] = manifest.get("metrics") or {}
    if metrics:
        lines.append(_table({"metric": "value", **{name: _number(value) for name, value in metrics.items()}}))
    else:
        lines.append("No metrics were recorded with this checkpoint.\n")
    return "\n".join(lines)


def _table(rows: Mapping[str, str]) -> str:
    head, *rest = (f"| {left} | {right} |" for left, right in rows.items())
    return "\n".join([head, "|---|---|", *rest]) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
