"""Annotation files beside a folder of pictures: the builder of most data sets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from PIL import Image

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.datasets.annotations import Annotations, Record
from minigpt4.datasets.builders.base import DatasetBuilder
from minigpt4.datasets.formats import EmotionMapping, num_images
from minigpt4.datasets.image_finder import ImageFinder
from minigpt4.datasets.map_dataset import (
    AnnotationDataset,
    ImageSizes,
    Recipe,
    map_fields,
)
from minigpt4.datasets.pictures import open_image
from minigpt4.datasets.sources import check_source, read_sources
from minigpt4.datasets.splits import split_indices

log = logging.getLogger(__name__)

_READ = 20_000
"""Records, spread over the set, that a check turns into turns: about half a second."""
_FILES = 2_000
"""Records of which a check looks for the pictures without opening them: asking a far disk takes a millisecond."""
_SAME_FILE = {  # published under both names
    "multi_task_conversation.json": "multitask_conversation.json",
    "multitask_conversation.json": "multi_task_conversation.json",
}


@dataclass(frozen=True)
class AnnotationInfo:
    """``build_info`` of annotation files. The last two keys belong to the format 'mapping'."""

    # a folder holds tables, what save_to_disk wrote, or one folder per class
    ann_path: str | list[str] = ""  # a .json, .jsonl, .csv, .tsv or .parquet file, a folder of records, or a list
    image_path: str = ""  # folder below which the records' images lie; "" = records without images
    sections: list[str] = field(default_factory=list)  # of a {section: [records]} file: those to train on, in order
    image_names: list[str] = field(default_factory=list)  # the first that exists: `["{id}.jpg", "{image}"]`
    label_ratio: float = 0.5  # format mapping: share of questions for the emotion alone, 0..1
    question_diversity_factor: float = 1.0  # format mapping: share of the built-in questions in use, 0..1


@registry.register("builder", "annotations")
class AnnotationsBuilder(DatasetBuilder):
    """Annotation files or tables (``ann_path``) and a folder of pictures (``image_path``), or a folder per class."""

    Info: ClassVar[type[Any]] = AnnotationInfo
    required: ClassVar[tuple[str, ...]] = ("ann_path",)

    def check_data(self) -> list[str]:
        """Files, columns, a spread of records and their pictures, of the training split and of ``val.ann_path``."""
        problems = self._image_path_problems()
        problems += self._split_problems("train", "build_info.ann_path", not problems)
        if self.cfg.val.ann_path:
            problems += self._split_problems("val", "val.ann_path", not problems)
        return problems

    def build(self, split: str) -> AnnotationDataset:
        """Records of the split; with ``val.fraction`` the training split is what is left."""
        annotations, finder = self._found(split)
        recipe = self._recipe_of(annotations, finder, split)
        indices = None
        if self.cfg.val.fraction > 0:
            indices = split_indices(annotations, recipe, finder, self.cfg, split)
        elif split == "val" and not self.cfg.val.ann_path:
            hint = "write val: {fraction: 0.1} or val: {ann_path: ...}"
            raise DataError(f"dataset '{self.cfg.name}': no val split; {hint}")
        first = finder.named(recipe.mapped(annotations[0]))
        self.log_format(first, annotations.shape, len(annotations), annotations.layout)
        return AnnotationDataset(self.cfg, recipe, annotations, finder, indices)

    def read(self, split: str) -> Annotations:
        """All records of the split's files, or those of the chosen sections."""
        return read_sources(self.ann_paths(split), self.sections() or None)

    def sections(self) -> list[str]:
        """Names of the sections to read; empty for files without sections."""
        return list(dict.fromkeys(name.strip() for name in self.info().sections))

    def required_keys(self) -> tuple[str, ...]:
        """As for every builder; folders of classes need ``image_path`` alone."""
        is_folder = self._class_folder() is not None
        return tuple(key for key in self.required if not (key == "ann_path" and is_folder))

    def _class_folder(self) -> str | None:
        """``image_path``, where it stands for ``ann_path``: pictures in one folder per class."""
        given, root = self.cfg.build_info.get("ann_path"), self.cfg.build_info.get("image_path")
        is_meant = not given and isinstance(root, str) and self.cfg.format in ("auto", "classification")
        return root if is_meant and root and Path(root).is_dir() else None

    def ann_paths(self, split: str) -> list[Path]:
        """The split's annotation files. Raises DataError for a missing one."""
        if split == "val" and self.cfg.val.ann_path:
            return [Path(self.cfg.val.ann_path)]
        given = self.info().ann_path or self._class_folder() or []
        paths = [Path(path) for path in ([given] if isinstance(given, str) else given)]
        return [_existing(path) for path in paths]

    def _found(self, split: str) -> tuple[Annotations, ImageFinder]:
        """Records of the split, and where their pictures lie."""
        annotations, finder = self.read(split), self.finder()
        return annotations, finder if annotations.root is None else ImageFinder(annotations.root)

    def finder(self) -> ImageFinder:
        """Where pictures lie, unless the layout of the records decides it."""
        root = self.image_root()
        return ImageFinder(Path(root) if root else None, tuple(self.info().image_names))

    def image_root(self) -> str:
        """The folder below which pictures lie; empty for records without."""
        return str(self.info().image_path)

    def recipe(self, record: Record, split: str, layout: str = "records") -> Recipe:
        """As for every builder; the emotion format also takes its two numbers from ``build_info``."""
        recipe = super().recipe(record, split, layout)
        if not isinstance(recipe.format, EmotionMapping):
            return recipe
        info = self.info()
        ratio = min(1.0, max(0.0, info.label_ratio))
        diversity = info.question_diversity_factor
        return replace(recipe, format=replace(recipe.format, label_ratio=ratio, question_diversity_factor=diversity))

    def _recipe_of(self, annotations: Annotations, finder: ImageFinder, split: str) -> Recipe:
        try:
            first = finder.named(map_fields(annotations[0], self.cfg.fields))
        except DataError as error:
            raise DataError(f"{annotations.where(0)}: {error}") from None
        return self.recipe(first, split, annotations.layout)

    def _image_path_problems(self) -> list[str]:
        given = self.image_root()
        if given and not Path(given).is_dir():
            kind = "is a file, expected a directory" if Path(given).exists() else "not found"
            return [f"{self._image_path_key()}: '{given}' {kind}"]
        return []

    def _image_path_key(self) -> str:
        return "build_info.image_path"

    def _split_problems(self, split: str, key: str, look_for_images: bool) -> list[str]:
        try:
            annotations, finder = self._found(split)
            recipe = self._recipe_of(annotations, finder, split)
        except DataError as error:
            return [f"{key}: {error}"]
        dataset = AnnotationDataset(self.cfg, recipe, annotations, finder)
        seen = []

        def look(index: int, is_opened: bool = True) -> None:
            def sizes() -> Iterator[Image.Image]:
                if not (look_for_images and is_opened):
                    raise _NotLookedAt
                return (open_image(path, decode=False) for path in finder.find(recipe.mapped(annotations[index])))

            try:
                record = dataset.record(index)
                recipe.turns({**record, "image_sizes": ImageSizes(sizes)}, Random(0))
                seen.append(num_images(record))
                if look_for_images and is_opened:  # the heads of the files alone: a broken one is told
                    list(sizes())
            except _NotLookedAt:
                seen.append(1)
            except DataError as error:
                raise DataError(f"{annotations.where(index)}: {error}") from None

        found: Counter[str] = Counter()

        def look_for_files(index: int) -> None:
            try:
                found.update(pattern for _, pattern in finder.located(recipe.mapped(annotations[index])))
            except DataError as error:
                raise DataError(f"{annotations.where(index)}: {error}") from None

        problems = self.spot_check(len(dataset), look)
        if not problems:
            problems = self.spot_check(len(dataset), lambda index: look(index, is_opened=False), _READ)
        if not problems and look_for_images:
            problems = self.spot_check(len(dataset), look_for_files, _FILES)
            if len(finder.names) > 1 and found:
                rules = ", ".join(f"{pattern} {count:,}" for pattern, count in found.most_common())
                log.info(
                    "dataset '%s': %s pictures looked for, found by: %s", self.cfg.name, f"{found.total():,}", rules
                )
        if not problems and finder.root is not None and not any(seen) and not self._is_text():
            columns = ", ".join(map(str, annotations[0]))
            hint = f"write fields: {{image: one of {columns}}}, or data_type: text"
            problems.append(f"build_info.image_path is set, but records name no image; {hint}")
        if not problems and split == "train":
            dataset.groups()  # a record without a group is told
        return problems

    def _is_text(self) -> bool:
        return self.cfg.format in ("text", "unnatural_instruction") or self.cfg.data_type == "text"


class _NotLookedAt(Exception):
    """A format asks for the size of a picture whose folder has been refused already."""


def _existing(path: Path) -> Path:
    other = _SAME_FILE.get(path.name)
    if other and not path.exists() and path.with_name(other).is_file():
        return path.with_name(other)
    check_source(path)
    return path
