"""A YAML block becomes a data set. A builder checks the block early and builds it late."""

from __future__ import annotations

import logging
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from minigpt4.common.errors import ConfigError, DataError, nearest
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig, ProcessorConfig, SplitProcessors
from minigpt4.conversation.boxes import BoxReader
from minigpt4.datasets.annotations import Record
from minigpt4.datasets.formats import Format, lines_of, recognise
from minigpt4.datasets.map_dataset import Recipe
from minigpt4.processors.base import ImageSpec as ImageSpec
from minigpt4.processors.base import make_image_processor, make_text_processor

if TYPE_CHECKING:
    from minigpt4.datasets.collate import SampleDataset

log = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"path/to|<[^<>]*>", re.IGNORECASE)
_PACKAGE = Path(__file__).resolve().parent.parent.parent
_LOOKED_AT = 16
"""Records, spread over the set, of which a check opens the pictures."""


class ImageSize(Protocol):
    """What a builder reads of its image argument; a check comes before the model and knows the size alone."""

    @property
    def size(self) -> int:
        """Side in pixels."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel; may be empty."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel; may be empty."""


class DatasetBuilder(ABC):
    """Builds the splits of one data set. ``Info`` is the typed form of ``build_info``."""

    Config: ClassVar[type[DatasetConfig]] = DatasetConfig
    Info: ClassVar[type[Any]]
    required: ClassVar[tuple[str, ...]] = ()  # keys of build_info that must be written, see required_keys

    has_loose_boxes: ClassVar[bool] = False  # published with boxes that stick out of their pictures

    def __init__(self, cfg: DatasetConfig, image: ImageSize, default_prompts: Sequence[str] = ()) -> None:
        self.cfg = cfg
        self.image = ImageSpec(image.size, tuple(image.mean), tuple(image.std))
        self.default_prompts = tuple(default_prompts)

    def check(self) -> list[str]:
        """Everything that can be wrong with the block, one message each; weights are not needed, nothing is kept."""
        problems = self.check_block()
        if not problems:
            try:
                problems = self.check_data()
            except (ConfigError, DataError) as error:
                problems = [str(error)]
        return problems

    def check_block(self) -> list[str]:
        """What is wrong with the block itself; no file of data is opened."""
        return self._info_problems() + self._key_problems()

    @abstractmethod
    def check_data(self) -> list[str]:
        """Messages about files and records; called when ``build_info`` itself is right. May raise DataError."""

    @abstractmethod
    def build(self, split: str) -> SampleDataset:
        """The data set of 'train' or 'val'. Raises DataError or ConfigError."""

    def info(self) -> Any:
        """``build_info`` as an ``Info``. Raises ConfigError with one line per mistake."""
        problems = self._info_problems()
        if problems:
            raise ConfigError("\n".join(f"dataset '{self.cfg.name}': {line}" for line in problems))
        return self.Info(**self.cfg.build_info)

    def required_keys(self) -> tuple[str, ...]:
        """Keys of ``build_info`` that this block must write."""
        return self.required

    def format_for(self, record: Record, layout: str = "records") -> tuple[str, Format, str]:
        """Name and function of the format of records like ``record``, and why 'auto' chose it (else empty)."""
        name, reason = self.cfg.format, ""
        if name == "auto":
            name, reason = recognise(record, layout)
        chosen: Format = registry.get("format", name)
        return name, chosen, reason

    def log_format(self, record: Record, shape: str, count: int, layout: str = "records") -> None:
        """Says what 'auto' chose and why: 'json list of 1,200 records with 'conversations' -> conversation'."""
        name, _, reason = self.format_for(record, layout)
        if reason:
            log.info("dataset '%s': %s of %s records %s -> %s", self.cfg.name, shape, f"{count:,}", reason, name)

    def recipe(self, record: Record, split: str, layout: str = "records") -> Recipe:
        """How records like ``record`` become samples. ``record`` is mapped and names its pictures."""
        name, chosen, _ = self.format_for(record, layout)
        text = self._processor(self.cfg.text_processor, split)
        vision = make_image_processor(self._processor(self.cfg.vis_processor, split), self.image)
        return Recipe(
            format=chosen,
            prompts=self._prompts(name),
            fields=self.cfg.fields,
            vision=vision.fast() if self.cfg.image_backend == "fast" else vision,
            text=make_text_processor(text),
            process_text=tuple(self.cfg.process_text) if text.name else (),
            boxes=BoxReader(self.cfg.box_format, self.cfg.box_unit, self.has_loose_boxes),
        )

    def spot_check(self, count: int, look: Callable[[int], None], most: int = _LOOKED_AT) -> list[str]:
        """The first complaint of ``look`` over at most ``most`` indices spread over a set of ``count``.

        With ``on_error: skip`` a broken record is no mistake of the YAML unless every one looked at is broken.
        """
        number = min(count, most)
        indices = sorted({place * (count - 1) // max(1, number - 1) for place in range(number)})
        problems = []
        for index in indices:
            try:
                look(index)
            except DataError as error:
                problems.append(str(error))
                if self.cfg.on_error == "raise":
                    break
        is_wrong = problems and (self.cfg.on_error == "raise" or len(problems) == len(indices))
        return problems[:1] if is_wrong else []

    def _prompts(self, format_name: str) -> tuple[str, ...]:
        if self.cfg.prompts:
            return tuple(self.cfg.prompts)
        if self.cfg.prompts_file:
            return lines_of(self._prompts_file())
        return self.default_prompts if format_name == "caption" else ()

    def _prompts_file(self) -> Path:
        """``prompts_file``; a card names one of the package, from the folder that holds the package."""
        given = Path(self.cfg.prompts_file)
        return given if given.is_file() else _PACKAGE.parent / given

    @staticmethod
    def _processor(processors: SplitProcessors, split: str) -> ProcessorConfig:
        return processors.eval if split != "train" and processors.eval.name else processors.train

    def _info_problems(self) -> list[str]:
        problems = info_problems(self.Info, self.cfg.build_info)
        for key in self.required_keys():
            if self.cfg.build_info.get(key) in (None, "", []):
                problems.append(f"build_info.{key} is not set")
        return problems

    def _key_problems(self) -> list[str]:
        cfg, problems = self.cfg, []
        if cfg.image_backend not in ("exact", "fast"):
            problems.append(f"image_backend: found '{cfg.image_backend}', allowed: exact, fast")
        if cfg.on_error == "skip" and cfg.max_bad_fraction == 0:
            problems.append("on_error: skip needs max_bad_fraction > 0, the share of samples that may be broken")
        if cfg.prompts_file and not self._prompts_file().is_file():
            problems.append(f"prompts_file: '{cfg.prompts_file}' not found")
        elif cfg.prompts_file and not self._prompts(""):
            problems.append(f"prompts_file: '{cfg.prompts_file}' is empty; one prompt per line")
        return problems


def info_problems(info: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Unknown keys, wrong types and placeholders of ``build_info``, one message each."""
    hints = typing.get_type_hints(info)
    problems = []
    for key, value in values.items():
        if key not in hints:
            problems.append(f"build_info.{key}: unknown key{nearest(key, hints)}; allowed: {', '.join(hints)}")
        elif not _fits(hints[key], value):
            problems.append(f"build_info.{key}: found {value!r}, expected {_described(hints[key])}")
        elif isinstance(value, str) and _PLACEHOLDER.search(value):
            problems.append(f"build_info.{key}: found the placeholder '{value}'; give a path that exists")
    return problems


def _fits(hint: Any, value: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(part, value) for part in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(inner[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_described(part) for part in inner)
    if origin is list:
        return f"a list of {_described(inner[0])}"
    if origin is dict:
        return "a mapping"
    return {str: "text", float: "a number"}.get(hint, str(hint))
