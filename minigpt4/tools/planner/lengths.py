"""How long samples are: measured where the data is at hand, otherwise assumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minigpt4.common.errors import ConfigError, MiniGPT4Error
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, DatasetConfig
from minigpt4.common.types import IGNORE_INDEX, IMAGE_TOKEN
from minigpt4.conversation.encoding import Encoder
from minigpt4.datasets.collate import SampleDataset
from minigpt4.models.base_model import BaseModel
from minigpt4.processors.base import ImageSpec
from minigpt4.runners.parts import choose_packing, default_prompts
from minigpt4.tools.planner.workload import Row, SampleShape, SetLengths, Window, fullest_row, make_window

log = logging.getLogger(__name__)

_PROMPT = 30
"""Tokens of a prompt around its image when nothing else is known: an instruction of a sentence or two."""
_LOOKED_AT = 32
"""Samples per data set whose length is measured, spread over the set."""
_SECONDS = 5.0
"""Photographs take up to a quarter of a second each to decode: measuring stops here."""


@dataclass(frozen=True)
class Assumed:
    """Lengths the user gives; None = measure, or take the default. can_encode: the tokenizer is the run's own."""

    prompt: int | None
    answer: int | None
    can_encode: bool


def find_rows(cfg: Config, model: BaseModel, assumed: Assumed, gpus: int) -> tuple[list[SetLengths], Window, Row]:
    """Lengths, window and the fullest row of a run. Raises ConfigError when no data set is drawn."""
    sets = find_lengths(cfg, model, assumed)
    window = make_window(cfg, sets, gpus)
    packed = choose_packing(cfg.run.packing, model) == "packed"
    return sets, window, fullest_row(sets, window, packed, cfg.run.row_tokens)


def find_lengths(cfg: Config, model: BaseModel, assumed: Assumed) -> list[SetLengths]:
    """Lengths of every data set that is drawn. Raises ConfigError when none is."""
    drawn = [dataset for dataset in cfg.datasets.values() if dataset.sample_ratio != 0]
    if not drawn:
        raise ConfigError("datasets: is empty; name at least one data set")
    return [_lengths(cfg, dataset, model, assumed) for dataset in drawn]


def _lengths(cfg: Config, dataset_cfg: DatasetConfig, model: BaseModel, assumed: Assumed) -> SetLengths:
    image = ImageSpec(model.cfg.image_size, model.image_mean, model.image_std)
    builder = registry.get("builder", dataset_cfg.builder)(dataset_cfg, image, default_prompts(cfg.model))
    found = _without_data(dataset_cfg, model.encoder, assumed)
    try:
        if builder.check():
            return found
        dataset: SampleDataset = builder.build("train")
        if not assumed.can_encode or (assumed.prompt, assumed.answer) != (None, None):
            return replace(found, size=len(dataset))
        return measured(dataset, model.encoder, cfg.run.seed)
    except MiniGPT4Error as error:
        log.warning("data set %s is not measured: %s", dataset_cfg.name, str(error).splitlines()[0])
        return found


def _without_data(dataset: DatasetConfig, encoder: Encoder, assumed: Assumed) -> SetLengths:
    """Every sample as long as the flags say, answers as long as ``max_txt_len`` allows."""
    images = 0 if dataset.data_type == "text" else 1
    prompt = 1 + (_PROMPT if assumed.prompt is None else assumed.prompt)
    answer = encoder.max_txt_len if assumed.answer is None else min(assumed.answer, encoder.max_txt_len)
    shape = SampleShape(images, encoder.num_image_tokens, prompt, answer)
    source = "assumed, answers of max_txt_len" if assumed.answer is None else "as given"
    ratio = 1.0 if dataset.sample_ratio is None else dataset.sample_ratio
    return SetLengths(dataset.name, dataset.batch_size, ratio, shape, shape, source, None)


def measured(dataset: SampleDataset, encoder: Encoder, seed: int) -> SetLengths:
    """Mean and longest of a few samples, encoded as training encodes them. Raises DataError for a broken one."""
    begun, shapes = time.monotonic(), []
    wanted = min(len(dataset), _LOOKED_AT)
    for place in range(wanted):
        encoded = encoder.encode_turns(dataset.sample(0, place * len(dataset) // wanted, seed).turns)
        image_positions = encoded.ids.count(IMAGE_TOKEN)
        answer = sum(label != IGNORE_INDEX for label in encoded.labels)
        prompt = len(encoded.ids) - image_positions - answer
        shapes.append(SampleShape(encoded.num_images, encoder.num_image_tokens, prompt, answer))
        if time.monotonic() - begun > _SECONDS:
            break
    ratio = 1.0 if dataset.cfg.sample_ratio is None else dataset.cfg.sample_ratio
    longest = max(shapes, key=lambda shape: shape.positions)
    source = f"{len(shapes)} of {len(dataset):,} samples of {dataset.name}"
    return SetLengths(dataset.name, dataset.cfg.batch_size, ratio, _mean(shapes), longest, source, len(dataset))


def _mean(shapes: Sequence[SampleShape]) -> SampleShape:
    images, prompt, answer = (
        round(sum(counts) / len(shapes))
        for counts in zip(*((shape.images, shape.prompt, shape.answer) for shape in shapes), strict=True)
    )
    return SampleShape(images, shapes[0].image_tokens, prompt, answer)
