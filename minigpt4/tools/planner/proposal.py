"""The smallest set of changes with which a run fits a card."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minigpt4.models.frozen_vision import why_not_frozen
from minigpt4.tools.planner.estimate import FRAGMENTS, Estimate, Planner, usable_bytes
from minigpt4.tools.planner.skeleton import POLICIES, Variant
from minigpt4.tools.planner.workload import Row, SetLengths, Window, fullest_row

# What a change costs, as a share of time; nf4 also costs some quality. Among sets of equal size the cheapest wins.
_COSTS = {
    "precision": 0.0, "cached vision": 0.01, "smaller rows": 0.03, "int8": 0.1, "fsdp": 0.15, "nf4": 0.2,
    "recompute mlp": 0.24, "recompute full": 0.36,
}  # fmt: skip
_MOST_CHANGES = 4


@dataclass(frozen=True)
class Proposal:
    """Changes as ``--options`` and what they give. changes: for people, one per change."""

    changes: tuple[str, ...]
    options: tuple[str, ...]
    estimate: Estimate


@dataclass(frozen=True)
class Work:
    """What rows are made of."""

    sets: Sequence[SetLengths]
    window: Window


@dataclass(frozen=True)
class _Try:
    variant: Variant
    shrinks: bool
    names: tuple[str, ...]


def propose(planner: Planner, work: Work, start: Estimate, card_gb: float) -> list[Proposal]:
    """Every smallest set of changes that fits with room to spare, else those that just fit, the cheapest first."""
    usable = usable_bytes(card_gb)
    for room in (usable / (1 + FRAGMENTS), usable):
        found: list[Proposal] = []
        for candidate in _candidates(planner, work, start):
            if found and len(candidate.names) > len(found[0].changes):
                break
            proposal = _try(planner, work, start, candidate, int(room))
            found += [proposal] if proposal is not None else []
        if found:
            return found
    return []


def _try(planner: Planner, work: Work, start: Estimate, candidate: _Try, room: int) -> Proposal | None:
    if planner.weights(candidate.variant) + start.context > room:
        return None
    row: Row | None = start.row
    if candidate.shrinks:
        row = _largest_row(planner, work, candidate.variant, start.row, room)
    if row is None:
        return None
    estimate = planner.estimate(candidate.variant, row)
    return _describe(planner, work, candidate, start, estimate) if estimate.total <= room else None


def _shows_pictures(work: Work) -> bool:
    return any(item.longest.images for item in work.sets)


def _candidates(planner: Planner, work: Work, start: Estimate) -> list[_Try]:
    """Combinations of up to four changes, fewest first, then by cost."""
    variant, cfg = start.variant, planner.cfg
    is_random = bool(cfg.model.llama_weights)  # random weights cannot be quantised
    may_quantise = cfg.model.freeze_llm and planner.on_gpu and not is_random and variant.shards == 1
    splits = (
        (planner.ranks.count,) if planner.ranks.count > 1 and variant.shards == 1 and variant.base == "as is" else ()
    )
    caches = () if variant.cached or why_not_frozen(planner.skeleton(variant)) or not _shows_pictures(work) else (True,)
    bases = {"as is": ("int8", "nf4"), "int8": ("nf4",), "nf4": ()}[variant.base] if may_quantise else ()
    precisions = ("bf16",) if variant.precision == "fp32" and planner.on_gpu else ()
    recomputes = POLICIES[POLICIES.index(variant.recompute) + 1 :]
    shrinks = (True,) if start.row.samples > 1 else ()
    found = []
    for precision, base, recompute, shrink, cached, shards in itertools.product(
        (None, *precisions), (None, *bases), (None, *recomputes), (False, *shrinks), (False, *caches), (None, *splits)
    ):
        names = [name for name, chosen in (("precision", precision), (f"recompute {recompute}", recompute)) if chosen]
        names += [base] if base else []
        names += ["smaller rows"] if shrink else []
        names += ["cached vision"] if cached else []
        names += ["fsdp"] if shards else []
        if len(names) > _MOST_CHANGES or (base and shards):  # quantised weights cannot be split
            continue
        changed = Variant(
            precision or variant.precision, base or variant.base, recompute or variant.recompute,
            cached or variant.cached, shards or variant.shards,
        )  # fmt: skip
        found.append(_Try(changed, shrink, tuple(names)))
    found.sort(key=lambda item: (len(item.names), sum(_COSTS[name] for name in item.names)))
    return found[1:]


def _largest_row(planner: Planner, work: Work, variant: Variant, row: Row, room: int) -> Row | None:
    """The fullest row of fewer samples that fits ``room`` bytes: what the line says, or somewhat less."""
    most = min(planner.most_samples(variant, row, room), row.samples - 1)
    for samples in dict.fromkeys((most, most - 1, most - 2, 3 * most // 4, most // 2, 1)):
        smaller = _work_of(work, row, samples)[1] if 1 <= samples <= most else row
        if smaller.positions < row.positions and planner.estimate(variant, smaller).total <= room:
            return smaller
    return None


def _work_of(work: Work, row: Row, samples: int) -> tuple[Work, Row]:
    """The same effective batch in smaller pieces, and its fullest row."""
    if row.packed:
        return work, fullest_row(work.sets, work.window, True, samples * row.shape.positions)
    sets = [replace(item, batch_size=min(item.batch_size, samples)) for item in work.sets]
    mean = sum(item.ratio * item.batch_size for item in sets) / sum(item.ratio for item in sets)
    accumulation = math.ceil(work.window.accumulation * work.window.samples_per_micro_batch / mean)
    window = replace(work.window, samples_per_micro_batch=mean, accumulation=accumulation)
    return Work(sets, window), fullest_row(sets, window, False, 0)


_TEXTS = {
    "precision": "16-bit weights and arithmetic",
    "int8": "int8 weights of the frozen language model",
    "nf4": "nf4 weights of the frozen language model",
    "recompute mlp": "MLPs recomputed in the backward pass (+24 % time)",
    "recompute full": "layers recomputed in the backward pass (+36 % time)",
    "cached vision": "vision features kept on disk, {picture:,.0f} kB per picture, no tower on the GPU in training",
    "fsdp": "weights, gradients and moments split over {ranks} GPUs",
}
_OPTIONS = {
    "precision": "run.precision=bf16", "int8": "model.low_resource=True", "nf4": "model.load_in_4bit=True",
    "recompute mlp": "run.recompute=mlp", "recompute full": "run.recompute=full",
    "cached vision": "model.cache_vision=disk", "fsdp": "run.parallel=fsdp",
}  # fmt: skip


def _describe(planner: Planner, work: Work, candidate: _Try, start: Estimate, estimate: Estimate) -> Proposal:
    changes, options = [], []
    picture = planner.picture_bytes(candidate.variant) / 1e3 if candidate.variant.cached else 0.0
    for name in candidate.names:
        if name == "smaller rows":
            changed = _work_of(work, start.row, estimate.row.samples)[0]
            text, keys = rows_change(planner, work, changed, start.row, estimate.row)
        else:
            text, keys = _TEXTS[name].format(picture=picture, ranks=planner.ranks.count), [_OPTIONS[name]]
            if name == "nf4" and start.variant.base == "int8":
                keys = ["model.low_resource=False", *keys]
        changes.append(text)
        options += keys
    return Proposal(tuple(changes), tuple(options), estimate)


def rows_change(planner: Planner, work: Work, changed: Work, before: Row, row: Row) -> tuple[str, list[str]]:
    """Rows of other sizes, for people and as options. Padded: what counts micro-batches follows their number."""
    if row.packed:
        text = f"rows of at most {row.positions:,} positions instead of {before.positions:,}"
        return text, [f"run.row_tokens={row.positions}"]
    run = planner.cfg.run
    options = [
        f"datasets.{new.name}.batch_size={new.batch_size}"
        for old, new in zip(work.sets, changed.sets, strict=True)
        if new.batch_size != old.batch_size
    ]
    accumulation = changed.window.accumulation
    options.append(f"run.accum_grad_iters={accumulation}")
    counts = {key: getattr(run, key) for key in ("iters_per_epoch", "warmup_steps", "save_every")}
    for key, count in {**counts, "valid.every": run.valid.every}.items():
        options += [f"run.{key}={math.ceil(count * accumulation / run.accum_grad_iters)}"] if count else []
    text = f"micro-batches of {row.samples} instead of {before.samples}, {accumulation} of them per optimiser step"
    return text, options
