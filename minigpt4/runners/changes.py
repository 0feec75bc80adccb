"""What a resumed run does otherwise than the run that wrote its checkpoint: settings compared, differences named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from minigpt4.common.checkpoint import Checkpoint
from minigpt4.common.errors import CheckpointError
from minigpt4.common.schema import Config
from minigpt4.models.weights import LORA_KEYS

_SAME_RESULT = frozenset("use_grad_checkpoint use_grad_checkpoint_llm cache_vision ckpt".split())
"""Keys of ``model`` that change memory and time alone; ``ckpt`` has been loaded over."""
_FILES = ("vit_weights", "q_former_model", "llama_model", "prompt_path")
"""Keys of ``model`` that name files: the same one may lie in another folder, so names are compared."""
_STEP = (
    "lr_sched init_lr min_lr warmup_lr warmup_steps lr_decay_rate weight_decay beta2 clip_grad_norm precision".split()
)
"""Keys of ``run`` that change the step from the same gradient, or its arithmetic."""


def sample_settings(
    cfg: Config, world_size: int, windows_per_epoch: int, fingerprints: Mapping[str, str]
) -> dict[str, object]:
    """The settings that decide which samples a window holds and what its gradient is; kept in a checkpoint."""
    run, sets = cfg.run, cfg.datasets
    return {
        "run.seed": run.seed,
        "run.accum_grad_iters": run.accum_grad_iters,
        "world size": world_size,
        "windows per epoch": windows_per_epoch,
        "run.max_epoch": run.max_epoch,
        "sample_ratio": {name: one.sample_ratio for name, one in sets.items()},
        "batch_size": {name: one.batch_size for name, one in sets.items()},
        "run.mix_temperature": run.mix_temperature,
        "balance": {name: asdict(one.balance) for name, one in sets.items() if one.balance.by},
        "data": dict(fingerprints),
    }


def name_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One sentence per setting that changes the order of samples or the gradient."""
    before, now = _by_window(before), _by_window(now)
    return [
        f"{key}: {before.get(key)!r} in the checkpoint, {value!r} now; losses will differ from an undisturbed run"
        for key, value in now.items()
        if before.get(key) != value
    ]


def _by_window(order: Mapping[str, Any]) -> dict[str, Any]:
    """``order`` with ranks and accumulation as their product: a window is the same list of samples however it is spread
    over ranks. (A schedule that is not constant still differs a little: it counts micro-batches per rank.)"""
    result = {"balance": {}, **order}  # checkpoints of before know none
    ranks, accumulation = result.pop("world size"), result.pop("run.accum_grad_iters")
    return {"micro-batches per window (run.accum_grad_iters x ranks)": ranks * accumulation, **result}


def check_lora(checkpoint: Checkpoint, config_text: str) -> None:
    """Raises CheckpointError when LoRA matrices would mean something else than they were trained to: no shape shows
    ``lora_alpha``. Reads two configurations and no weights."""
    problems = [
        f"model.{key}: {found!r} in the checkpoint, {ours!r} now"
        for key, found, ours in _changed(checkpoint, config_text, "model")
        if key in LORA_KEYS
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: its LoRA was trained with other settings; put them back to go on from it\n"
            + "\n".join(problems)
        )


def name_model_changes(checkpoint: Checkpoint, config_text: str) -> list[str]:
    """One sentence per setting with which the same weights compute something else, or take another step."""
    model = [
        f"model.{key}: {found!r} in the checkpoint, {ours!r} now; the weights were trained with the former"
        for key, found, ours in _changed(checkpoint, config_text, "model")
        if key not in _SAME_RESULT
    ]
    step = [
        f"run.{key}: {found!r} in the checkpoint, {ours!r} now; losses will differ from an undisturbed run"
        for key, found, ours in _changed(checkpoint, config_text, "run")
        if key in _STEP
    ]
    return [*model, *step]


def _changed(checkpoint: Checkpoint, config_text: str, section: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, the checkpoint's value, ours) of ``section`` where they differ. Keys that one of them does not know are
    passed over, and those of LoRA where neither has any."""
    try:
        config = yaml.safe_load(checkpoint.config_path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{checkpoint.config_path}: not readable as YAML ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get(section), dict):
        raise CheckpointError(f"{checkpoint.config_path}: has no section '{section}'; copy that of the job there")
    before, now = config[section], yaml.safe_load(config_text)[section]
    has_lora = bool(before.get("lora_r") or now.get("lora_r"))
    for key, ours in now.items():
        found = before.get(key, ours)
        is_default = key in _FILES and not (found and ours)  # nothing was named: the file of the architecture
        if not is_default and _meaning(key, found) != _meaning(key, ours) and (has_lora or not key.startswith("lora_")):
            yield key, found, ours


def _meaning(key: str, value: Any) -> Any:
    if key in _FILES and isinstance(value, str):
        return Path(value).name
    return sorted(value) if key == "lora_target_modules" else value
