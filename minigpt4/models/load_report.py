"""What loading did: names and shapes of a file against those of the model, and a report that is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import CheckpointError
from minigpt4.common.schema import ModelConfig
from minigpt4.models.weights import LORA_KEYS, Weights, canonical_name, is_lora, part_of

log = logging.getLogger(__name__)

_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_FEW = 5  # names written out per list
_KEPT_WIDE = 0.01  # share of bytes a model may keep in float32 on purpose (a router, norms)


@dataclass
class LoadReport:
    """What the load of one file (or folder) did. Lists hold canonical names.

    loaded: tensors per part. missing: ours that the file lacks. ignored: the file's that are known not to be ours.
    unexpected: the file's that nobody knows. mismatched: of another shape. notes and cautions: sentences for the log.
    """

    source: str
    loaded: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)

    def add_loaded(self, names: Iterable[str]) -> None:
        """Count tensors, by canonical name, into their parts."""
        for name in names:
            self.loaded[part_of(name)] = self.loaded.get(part_of(name), 0) + 1

    def parts(self) -> dict[str, dict[str, int]]:
        """Part -> numbers of loaded, missing, unexpected, mismatched and ignored tensors."""
        table = {part: {"loaded": count} for part, count in self.loaded.items()}
        for kind in ("missing", "unexpected", "mismatched", "ignored"):
            for name in getattr(self, kind):
                row = table.setdefault(part_of(name), {})
                row[kind] = row.get(kind, 0) + 1
        return dict(sorted(table.items()))

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: numbers per part, and the first names of every list."""
        lists = {kind: getattr(self, kind) for kind in ("missing", "unexpected", "mismatched", "ignored")}
        names = {kind: found[:_FEW] for kind, found in lists.items() if found}
        remarks = [*self.warnings(), *self.notes]
        return {"source": self.source, "parts": self.parts(), "first_names": names, "remarks": remarks}

    def warnings(self) -> list[str]:
        """Parts that keep their initial values, tensors that nobody knows, and cautions."""
        lines = [
            f"{self.source}: no tensors of {part}; it keeps its initial values"
            for part, row in self.parts().items()
            if row.get("missing") and not row.get("loaded")
        ]
        if self.unexpected:
            first = ", ".join(self.unexpected[:_FEW])
            lines.append(f"{self.source}: {len(self.unexpected)} unknown tensors were left out, first: {first}")
        return lines + self.cautions

    def lines(self) -> list[str]:
        """The table of this report and all remarks, for the log."""
        return [*report_table([self]), *self.warnings(), *self.notes]


def report_table(reports: Sequence[LoadReport]) -> list[str]:
    """One line per source and part, under a headline; parts of a file that are not ours share a line."""
    rows = []
    for report in reports:
        name, unused = Path(report.source).name, 0
        for part, row in report.parts().items():
            if set(row) == {"ignored"}:
                unused += row["ignored"]
            else:
                rows.append((name, part, row))
        rows += [(name, "(not ours)", {"ignored": unused})] * (unused > 0)
    width = max([len(name) for name, _, _ in rows] + [7])
    kinds = ("loaded", "missing", "unexpected", "mismatched", "ignored")
    lines = [f"{'weights':<{width}}  {'part':<16}" + "".join(f"{kind:>12}" for kind in kinds)]
    for name, part, row in rows:
        lines.append(f"{name:<{width}}  {part:<16}" + "".join(f"{row.get(kind, 0):>12}" for kind in kinds))
    return lines


def log_reports(reports: Sequence[LoadReport]) -> None:
    """The table, and a warning for everything that is not as a reader would expect."""
    if reports:
        for line in report_table(reports):
            log.info(line)
    for report in reports:
        for line in report.notes:
            log.info(line)
        for line in report.warnings():
            log.warning(line)


def match_weights(
    parameters: Mapping[str, Tensor], trained: Iterable[str], state: Mapping[str, Tensor], source: str, complete: bool
) -> tuple[dict[str, Tensor], LoadReport]:
    """Pair the tensors of a file with parameters by canonical name.

    parameters: canonical name -> tensor of the model. trained: the canonical names that train.
    complete: every trained tensor must be in the file (a finished checkpoint); otherwise a part may be absent as a
    whole (stage 1 weights have no LoRA), but never in pieces. Returns canonical name -> value to copy, and the report.
    Raises CheckpointError for unknown names, wrong shapes, missing trained tensors and LoRA matrices that do not apply.
    """
    offered = {canonical_name(name): value for name, value in state.items()}
    report = LoadReport(source, ignored=sorted(name for name in offered if _BUFFERS.search(name)))
    values = {name: value for name, value in offered.items() if name in parameters}
    report.unexpected = sorted(set(offered) - set(values) - set(report.ignored))
    report.mismatched = sorted(name for name, value in values.items() if value.shape != parameters[name].shape)
    report.missing = sorted(set(trained) - set(values))
    problems = _lora_problems(parameters, offered, report)
    others = [name for name in report.unexpected if not is_lora(name)]
    if others:
        problems.append(f"{len(others)} tensors are unknown to this model, first: {others[0]}")
    for name in report.mismatched:
        if not is_lora(name):
            problems.append(f"{name}: file {list(values[name].shape)}, model {list(parameters[name].shape)}")
    present = {part_of(name) for name in values}
    bad = [name for name in report.missing if complete or part_of(name) in present]
    if bad:
        problems.append(f"{len(bad)} trained tensors are missing in the file, first: {bad[0]}")
    if not values:
        problems.append("no tensor of the file fits this model")
    if problems:
        raise CheckpointError("\n".join(f"{source}: {problem}" for problem in problems[:8]))
    report.add_loaded(values)
    return values, report


def _lora_problems(parameters: Mapping[str, Tensor], offered: Mapping[str, Tensor], report: LoadReport) -> list[str]:
    """What is wrong with the LoRA matrices of a file, in terms of the keys that can put it right."""
    ours = {name: value for name, value in parameters.items() if is_lora(name)}
    theirs = {name: value for name, value in offered.items() if is_lora(name)}
    if not theirs:
        return []
    rank = f"LoRA of rank {_rank(theirs)} on {', '.join(_targets(theirs))}"
    if not ours:
        return [f"holds {rank}, the model has none (check lora_r): set model.lora_r and lora_alpha as it was trained"]
    problems = []
    unknown = [name for name in report.unexpected if is_lora(name)]
    if unknown:
        hint = "another language model, or other names"
        if _targets(theirs) != _targets(ours):
            hint = f"on {', '.join(_targets(theirs))}; model.lora_target_modules: {', '.join(_targets(ours))}"
        problems.append(f"{len(unknown)} LoRA matrices in the file do not apply ({hint}), first: {unknown[0]}")
    if report.mismatched and _rank(theirs) != _rank(ours):
        problems.append(f"holds {rank}, model.lora_r is {_rank(ours)} (check lora_r)")
    else:
        problems += [
            f"{name}: file {list(theirs[name].shape)}, model {list(ours[name].shape)} (another language model)"
            for name in report.mismatched
            if is_lora(name)
        ]
    return problems


def _rank(lora: Mapping[str, Tensor]) -> str:
    """``64``; ``8 and 16`` when the matrices differ. A is [r, in], B is [out, r]."""
    ranks = {value.shape[0 if ".lora_A." in name else -1] for name, value in lora.items() if value.dim() > 1}
    return " and ".join(str(rank) for rank in sorted(ranks))


def _targets(lora: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers LoRA sits on: q_proj, v_proj."""
    return sorted({name.split(".lora_", 1)[0].rsplit(".", 1)[-1] for name in lora})


def check_lora_settings(cfg: ModelConfig, weights: Weights) -> list[str]:
    """Compare the settings that a file's own configuration names with ours: shapes do not show ``lora_alpha``.

    Returns notes for the report. Raises CheckpointError naming both values of each difference.
    """
    if not cfg.lora_r or not any(is_lora(canonical_name(name)) for name in weights.tensors):
        return []
    problems = []
    for key in LORA_KEYS:
        found, ours = weights.lora.get(key), getattr(cfg, key)
        if isinstance(found, list):
            found, ours = sorted(found), sorted(ours)
        if found is not None and found != ours:
            problems.append(f"{weights.source}: LoRA was trained with {key} {found}, model.{key} is {ours}")
    if problems:
        raise CheckpointError("\n".join(problems))
    if "lora_alpha" in weights.lora:
        return []
    return [f"{weights.source}: does not record lora_alpha; its LoRA is used with model.lora_alpha {cfg.lora_alpha}"]


def frozen_bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """``float16`` -> bytes of the frozen parameters in it; int8 and nf4 (uint8) weights count as stored."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            name = str(parameter.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + parameter.numel() * parameter.element_size()
    return sizes


def check_not_upcast(model: nn.Module, cfg: ModelConfig, dtype: torch.dtype) -> None:
    """The language model's frozen weights must be in ``dtype``, or quantised; float32 copies double the memory.

    Raises CheckpointError with the bytes that are wider. A model may keep a hundredth in float32 by design.
    """
    sizes = frozen_bytes_by_dtype(model.get_submodule("llama_model"))
    wide = {name: size for name, size in sizes.items() if getattr(torch, name).itemsize > dtype.itemsize}
    if cfg.freeze_llm and sum(wide.values()) > _KEPT_WIDE * sum(sizes.values()):
        found = ", ".join(f"{size / 1e9:.3g} GB in {name}" for name, size in wide.items())
        asked = "quantised" if cfg.low_resource or cfg.load_in_4bit else str(dtype).removeprefix("torch.")
        raise CheckpointError(f"frozen weights of {cfg.llama_model} were cast up: {found}; asked: {asked}")
