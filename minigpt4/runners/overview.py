"""What a run is about to do, in numbers and one decoded example per data set. ``--dry-run`` ends after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text
from torch import nn

from minigpt4.common.logger import console
from minigpt4.common.types import IGNORE_INDEX, IMAGE_TOKEN, Sample
from minigpt4.conversation.encoding import Encoder
from minigpt4.datasets.balance import Groups
from minigpt4.datasets.collate import SampleDataset
from minigpt4.datasets.sampler import WindowSampler
from minigpt4.models.base_model import BaseModel
from minigpt4.models.weights import part_of
from minigpt4.runners.parts import Plan

log = logging.getLogger(__name__)

_LOOKED_AT = 128
"""Records looked at before a run, all data sets together."""
_GROUPS_SHOWN = 8
"""Balanced groups that the header names; of more than these the smallest and the largest."""
_SHOWN = 700
"""Characters of one piece of an example; longer pieces lose their middle."""


@dataclass(frozen=True)
class Survey:
    """Counts over records spread evenly over one data set.

    tokens: positions, of which image_tokens stand for pictures and supervised are answers. cut: answers that lost their
    end to ``max_txt_len``. ended: samples whose labels hold the end symbol. example: the first record, see ``spell``.
    """

    dataset: SampleDataset
    looked_at: int
    tokens: int
    image_tokens: int
    supervised: int
    cut: int
    ended: int
    example: list[tuple[str, bool]]

    @property
    def name(self) -> str:
        """The YAML key."""
        return self.dataset.name


def survey(datasets: Sequence[SampleDataset], encoder: Encoder, seed: int) -> list[Survey]:
    """Encodes a few records of every data set, as training would."""
    end = encoder.tokenizer.encode(encoder.end_sym)
    result = []
    for dataset in datasets:
        looked_at = min(len(dataset), max(4, _LOOKED_AT // len(datasets)))
        tokens = image_tokens = supervised = cut = ended = 0
        example: list[tuple[str, bool]] = []
        for place in range(looked_at):
            sample: Sample = dataset.sample(0, place * len(dataset) // looked_at, seed)
            encoded = encoder.encode_turns(sample.turns)
            tokens += len(encoded.ids)
            image_tokens += encoded.ids.count(IMAGE_TOKEN)
            supervised += sum(label != IGNORE_INDEX for label in encoded.labels)
            cut += encoded.is_truncated
            ended += _holds(encoded.labels, end[-1:])
            example = example or encoder.spell(encoded.ids, encoded.labels)
        result.append(Survey(dataset, looked_at, tokens, image_tokens, supervised, cut, ended, example))
    return result


def _holds(labels: Sequence[int], end: Sequence[int]) -> bool:
    # the last token of the end symbol: its first ones may have been merged with the answer
    return not end or end[0] in labels


def show(surveys: Sequence[Survey], sampler: WindowSampler, plan: Plan, world_size: int, model: BaseModel) -> None:
    """Data sets, batch, windows, parameters and examples (rank 0)."""
    for line in data_lines(surveys, sampler, plan, world_size):
        log.info(line)
    for line in batch_lines(surveys, sampler, plan, world_size):
        log.info(line)
    for line in parameter_lines(model):
        log.info(line)
    for item in surveys:
        _show_example(item)
    cut, looked_at = sum(item.cut for item in surveys), sum(item.looked_at for item in surveys)
    log.info("answers cut by max_txt_len: %d of %d records looked at (%.1f %%)", cut, looked_at, 100 * cut / looked_at)


def data_lines(surveys: Sequence[Survey], sampler: WindowSampler, plan: Plan, world_size: int) -> Iterator[str]:
    """One line per data set: size, share of the draws, passes over it, length of its samples; one per balanced set."""
    drawn = plan.total_windows * plan.accumulation * world_size  # micro-batches of all ranks
    width = max(len(item.name) for item in surveys)
    for item, share in zip(surveys, sampler.shares, strict=True):
        size = len(item.dataset)
        passes = drawn * share * item.dataset.cfg.batch_size / size
        mean = [count / item.looked_at for count in (item.tokens, item.image_tokens, item.supervised)]
        yield (
            f"data    {item.name:<{width}}  {size:>10,} samples  ratio {100 * share:5.1f} %  {passes:8.2f} passes  "
            f"{mean[0]:.0f} tokens each ({mean[1]:.0f} image, {mean[2]:.0f} supervised)"
        )
        groups = item.dataset.groups()
        if groups is not None:
            yield f"balance {item.name:<{width}}  {balance_text(item.dataset.cfg.balance.by, groups, passes)}"


def balance_text(by: str, groups: Groups, passes: float) -> str:
    """Share of the draws and passes of each group, the smallest first; of many groups both ends."""
    sizes, quotas = groups.sizes, groups.quotas()
    order = sorted(range(len(sizes)), key=lambda number: (sizes[number], groups.names[number]))
    parts = [
        f"{groups.names[number]} {100 * quotas[number] / quotas.sum():.1f} % "
        f"({sizes[number]:,} records, {passes * quotas[number] / sizes[number]:.2f} passes)"
        for number in order
    ]
    if len(parts) > _GROUPS_SHOWN:
        half = _GROUPS_SHOWN // 2
        parts[half:-half] = [f"... {len(parts) - 2 * half} more ..."]
    return f"by {by}, temperature {groups.temperature:g}: " + ", ".join(parts)


def batch_lines(surveys: Sequence[Survey], sampler: WindowSampler, plan: Plan, world_size: int) -> Iterator[str]:
    """Effective batch, number of windows, tokens per optimiser step."""
    per_batch = sampler.expected_samples_per_micro_batch()
    effective = per_batch * plan.accumulation * world_size
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    yield (
        f"batch   {effective:.1f} samples per step = {per_batch:.2f} per micro-batch x {plan.accumulation} accumulated "
        f"x {ranks}"
    )
    epochs = "1 epoch" if plan.max_epoch == 1 else f"{plan.max_epoch} epochs"
    yield f"steps   {epochs} x {plan.windows_per_epoch} windows = {plan.total_windows:,} optimiser steps"
    micro_batches = plan.accumulation * world_size
    tokens = supervised = 0.0
    for item, share in zip(surveys, sampler.shares, strict=True):
        samples = micro_batches * share * item.dataset.cfg.batch_size
        tokens += samples * item.tokens / item.looked_at
        supervised += samples * item.supervised / item.looked_at
    yield f"tokens  about {tokens:,.0f} per step, {supervised:,.0f} of them supervised"


def parameter_lines(model: nn.Module) -> Iterator[str]:
    """One line per part: what trains and what is frozen."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts.setdefault(part_of(name), [0, 0])[not parameter.requires_grad] += parameter.numel()
    width = max(map(len, counts))
    for part, (trained, frozen) in counts.items():
        yield f"part    {part:<{width}}  {trained:>14,} trainable  {frozen:>14,} frozen"
    trained, frozen = (sum(pair[kind] for pair in counts.values()) for kind in (0, 1))
    yield f"part    {'all':<{width}}  {trained:>14,} trainable  {frozen:>14,} frozen"


def example_text(item: Survey) -> Text:
    """The first record as the model reads it: supervised pieces in green and between the marks >> and <<."""
    text = Text(f"example {item.name}: ")
    for piece, is_supervised in item.example:
        shown = piece if len(piece) <= _SHOWN else f"{piece[: _SHOWN // 2]} [...] {piece[-_SHOWN // 2 :]}"
        shown = shown.replace("\n", "\\n")
        text.append(f">>{shown}<<" if is_supervised else shown, style="bold green" if is_supervised else "")
    return text


def _show_example(item: Survey) -> None:
    text = example_text(item)
    if console.is_terminal:
        console.print(text, soft_wrap=True, highlight=False)
    else:
        log.info(text.plain)
