"""Records as Samples: by index, lazily, and the same for the same seed."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from minigpt4.common.errors import DataError, nearest
from minigpt4.common.schema import DatasetConfig
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, BadRecord, Sample, Turn
from minigpt4.conversation.boxes import BoxReader
from minigpt4.datasets.annotations import Annotations, Record
from minigpt4.datasets.balance import Groups, group_records, numbered_groups
from minigpt4.datasets.facts import facts
from minigpt4.datasets.formats import TEXT_FIELDS, Format
from minigpt4.datasets.image_finder import ImageFinder
from minigpt4.datasets.kept import kept
from minigpt4.datasets.pictures import ImageSource, open_encoded, open_image
from minigpt4.datasets.talks import with_part_images
from minigpt4.processors.base import ImageProcessor, TextProcessor

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt4.common.types import Pixels
    from minigpt4.datasets.cached_pictures import CachedPictures
    from minigpt4.datasets.picture_cache import PictureCache

log = logging.getLogger(__name__)


def map_fields(record: Record, fields: Mapping[str, str]) -> Record:
    """``record`` with column ``fields[name]`` also under ``name``, and with the pictures its messages name.

    Raises DataError for a column that is not there.
    """
    for name, column in fields.items():
        if column not in record:
            known = ", ".join(map(str, record))
            raise DataError(f"fields.{name}: no column '{column}'{nearest(column, map(str, record))}; columns: {known}")
    return with_part_images({**record, **{name: record[column] for name, column in fields.items()}})


@dataclass(frozen=True)
class Recipe:
    """How a record becomes a sample: format, its prompts and the processors of one split."""

    format: Format
    prompts: tuple[str, ...]
    fields: Mapping[str, str]
    vision: ImageProcessor
    text: TextProcessor
    process_text: tuple[str, ...]
    boxes: BoxReader = BoxReader()

    def mapped(self, record: Record) -> Record:
        """``record`` with the columns of ``fields`` under the names that formats know."""
        return map_fields(record, self.fields)

    def turns(self, record: Record, rng: Random) -> tuple[Turn, ...]:
        """Turns of a mapped record, cleaned where the configuration says so."""
        if "fields" in self.process_text:
            record = {**record, **{key: self._cleaned(record[key]) for key in TEXT_FIELDS if key in record}}
        turns = self.format({**record, "box_reader": self.boxes}, self.prompts, rng)
        if "questions" in self.process_text:
            turns = tuple(replace(turn, prompt=self._cleaned_prompt(turn.prompt)) for turn in turns)
        if "answers" in self.process_text:
            turns = tuple(replace(turn, answer=self.text(turn.answer)) for turn in turns)
        return turns

    def _cleaned(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._cleaned(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def _cleaned_prompt(self, prompt: str) -> str:
        # the text processor must not see the image tags (it would lower-case them) nor the closing space
        if prompt == IMAGE_TAG or self.text(prompt) == prompt:
            return prompt
        first, *others = prompt.split(IMAGE_PROMPT)
        parts = [self.text(first)]
        for part in others:
            parts += [IMAGE_PROMPT, self.text(part)]
        return " ".join(part for part in parts if part) + (" " if prompt.endswith(" ") else "")


class ImageSizes(Sequence[tuple[int, int]]):
    """Width and height of a record's pictures as they are stored; nothing is opened before a format asks.

    ``images``: the pictures themselves, opened once.
    """

    def __init__(self, open_images: Callable[[], Iterable[Image.Image]]) -> None:
        self._open = open_images

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures in their order. Raises DataError for one that cannot be read."""
        return list(self._open())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        """(width, height) of one picture."""
        return self.images[index].size


class MapDataset(ABC):
    """Samples by index. ``on_error: skip`` puts the next readable sample in the place of a broken one."""

    def __init__(self, cfg: DatasetConfig, recipe: Recipe) -> None:
        self.cfg = cfg
        self.name = cfg.name
        self.recipe = recipe
        self.bad: set[int] = set()
        self.features: CachedPictures | None = None  # frozen features in the place of pixels
        self.picture_cache: PictureCache | None = None  # decoded and scaled pictures on disk

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Place of a sample, for messages."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """The mapped record with ``images``, as formats read it. Raises DataError without its place."""

    @abstractmethod
    def load(self, index: int, rng: Random) -> Sample:
        """The sample at ``index``. Raises DataError without its place."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the data; changes when a file does."""

    def sources(self, index: int) -> Sequence[ImageSource]:
        """Where a sample's pictures lie, in order. Raises DataError without its place, also where that is not known."""
        raise DataError("this kind of data set does not know its pictures before they are read")

    def pictures(self, index: int) -> list[Path | bytes]:
        """Files or contents of a sample's pictures, none of them decoded. Raises DataError for one that is missing."""
        return [source if isinstance(source, Path) else source.read() for source in self.sources(index)]

    def facts(self, index: int) -> dict[str, Any]:
        """What a report may say of a sample: ``images`` (paths), and where known ``section``, ``group``, ``meta``."""
        return facts(self, index)

    def groups(self) -> Groups | None:
        """What ``balance.by`` makes of the records; None without. Raises DataError where groups are not known."""
        if self.cfg.balance.by:
            raise DataError("balance: this kind of data set does not know its records before they are read")
        return None

    def sample(self, pass_index: int, index: int, seed: int) -> Sample:
        """A sample as a pure function of its arguments. Raises DataError with data set, file and place."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        passed_over: list[BadRecord] = []
        for offset in range(len(self)):
            current = (index + offset) % len(self)
            try:
                sample = self.load(current, Random(f"{seed}/{self.name}/{pass_index}/{current}"))
            except DataError as error:
                message = f"dataset '{self.name}', {self.where(current)}: {error}"
                if self.cfg.on_error == "raise":
                    raise DataError(message) from error
                self._count_bad(current, message)
                passed_over.append(BadRecord(self.name, current, message))
            else:
                return replace(sample, passed_over=tuple(passed_over)) if passed_over else sample
        raise DataError(f"dataset '{self.name}': none of its {len(self)} samples can be read")

    def _count_bad(self, index: int, message: str) -> None:
        if index in self.bad:
            return
        self.bad.add(index)
        count, limit = len(self.bad), self.cfg.max_bad_fraction * len(self)
        if count > limit:
            allowed = f"max_bad_fraction {self.cfg.max_bad_fraction} allows {int(limit)}"
            found = f"{count} of {len(self)} samples cannot be read"
            raise DataError(f"dataset '{self.name}': {found}, {allowed}; the last one: {message}")
        if count & (count - 1) == 0:  # 1, 2, 4, 8, ...: a hopeless set does not flood the log
            log.warning("%s; skipped (%d so far in this process)", message, count)

    def open(self, source: ImageSource) -> Image.Image:
        """A picture as the processor wants it: decoded, or with ``image_backend: fast`` not."""
        return open_image(source) if self.cfg.image_backend == "exact" else open_encoded(source)

    def _opened(self, sources: Sequence[ImageSource]) -> list[Image.Image]:
        """The pictures; where pixels are known already, their sizes alone."""
        if self.features is None and self.picture_cache is None:
            return [self.open(source) for source in sources]
        return [open_image(source, decode=False) for source in sources]

    def _pixels(self, sources: Sequence[ImageSource], pictures: ImageSizes) -> tuple[Tensor | Pixels, ...]:
        if self.picture_cache is None:
            return tuple(self.recipe.vision.prepare(image) for image in pictures.images)
        prepare = self.recipe.vision.prepare
        return tuple(self.picture_cache(source, lambda source: prepare(self.open(source))) for source in sources)

    def make_sample(
        self, index: int, record: Record, sources: Callable[[], Sequence[ImageSource]], sample_id: str, rng: Random
    ) -> Sample:
        """Turns and tensors of one mapped record; pictures are opened when a prompt or the format asks for them, and
        not decoded where their features are known.

        Raises DataError when tags and pictures differ in number.
        """
        located = cache(sources)  # looked up when a prompt or the format asks
        pictures = ImageSizes(lambda: self._opened(located()))
        turns = self.recipe.turns({**record, "image_sizes": pictures}, rng)
        tags = sum(turn.prompt.count(IMAGE_TAG) for turn in turns)
        if tags not in (0, len(record["images"])):
            raise DataError(f"the prompts hold {tags} {IMAGE_TAG}, but there are {len(record['images'])} images")
        if not tags:
            tensors: tuple[Tensor | Pixels, ...] = ()
        elif self.features is not None:
            tensors = self.features[index]
        else:
            tensors = self._pixels(located(), pictures)
        return Sample(turns, tensors, f"{self.name}/{sample_id}", {"dataset": self.name})


class AnnotationDataset(MapDataset):
    """Records of annotation files and pictures on disk."""

    def __init__(
        self,
        cfg: DatasetConfig,
        recipe: Recipe,
        annotations: Annotations,
        finder: ImageFinder,
        indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cfg, recipe)
        self.annotations, self.finder = annotations, finder
        self._indices: Sequence[int] = range(len(annotations)) if indices is None else indices
        if not self._indices:
            raise DataError(f"dataset '{cfg.name}': has no samples")

    def __len__(self) -> int:
        return len(self._indices)

    def where(self, index: int) -> str:
        """'faces.csv, line 7'."""
        return self.annotations.where(self._indices[index])

    def record(self, index: int) -> Record:
        """The mapped record with ``images``, as formats read it."""
        return self.finder.named(self.recipe.mapped(self.annotations[self._indices[index]]))

    def annotation_index(self, index: int) -> int:
        """Number of a sample's record in ``annotations``."""
        return self._indices[index]

    def load(self, index: int, rng: Random) -> Sample:
        """Reads pictures now; the annotation file was read once."""
        record = self.recipe.mapped(self.annotations[self._indices[index]])
        name = record_id(record, self._indices[index])
        return self.make_sample(index, self.finder.named(record), lambda: self.finder.find(record), name, rng)

    def sources(self, index: int) -> Sequence[ImageSource]:
        """Files that exist, or places in tables."""
        return self.finder.find(self.recipe.mapped(self.annotations[self._indices[index]]))

    def facts(self, index: int) -> dict[str, Any]:
        """Like the others', with the section the record was written in and its group."""
        known, section = super().facts(index), self.annotations.section(self._indices[index])
        if section:
            known["section"] = section
        if self.cfg.balance.by:
            with suppress(DataError):  # a record without a group
                known["group"] = self._group_of(self._indices[index])
        return known

    def groups(self) -> Groups | None:
        """Records by section or by the field ``balance.by``. Raises DataError for a record without, and without groups.

        A field called 'section' counts where the file has no sections.
        """
        return self._groups if self.cfg.balance.by else None

    @cached_property
    def _groups(self) -> Groups:
        """From disk where annotations are large and were grouped before."""
        by, temperature = self.cfg.balance.by, self.cfg.balance.temperature
        chosen = hashlib.sha256(np.asarray(self._indices, dtype=np.int64).tobytes()).hexdigest()
        place = kept(self.annotations, "groups", [sorted(self.recipe.fields.items()), by, chosen], "<u4")
        found = place.read() if place else None
        if found:
            return numbered_groups(found[1]["groups"], found[0], temperature)
        groups = group_records([self._group_of(index) for index in self._indices], temperature)
        if 1 < len(groups.names) == len(self):
            raise DataError(f"balance.by '{by}': every record is a group of its own")
        if place:
            place.write(groups.of_record, groups=groups.names)
        return groups

    def _group_of(self, index: int) -> str:
        by = self.cfg.balance.by
        if by == "section" and self.annotations.section(index):
            return self.annotations.section(index)
        record = self.recipe.mapped(self.annotations[index])
        value = record.get(by)
        if by not in record:
            hint = nearest(by, map(str, record))
            problem = f"balance.by: no field '{by}'{hint}; fields: {', '.join(map(str, record))}"
        elif isinstance(value, (str, int, float)) and str(value).strip():
            return str(value).strip()
        else:
            problem = f"balance.by: field '{by}' holds {value!r}, expected text or a number"
        raise DataError(f"{self.annotations.where(index)}: {problem}")

    def fingerprint(self) -> str:
        """Hash over the annotation files."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self.annotations.fingerprint()


def record_id(record: Record, index: int) -> str:
    """``id``, ``image_id`` or ``question_id`` of a record, else its number."""
    for key in ("id", "image_id", "question_id"):
        if record.get(key) not in (None, ""):
            return str(record[key])
    return str(index)
