"""Published data sets whose annotations have layouts of their own: LAVIS, RefCOCO, Visual Genome, OCR-VQA."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.datasets.annotations import Annotations
from minigpt4.datasets.builders.annotations import AnnotationInfo, AnnotationsBuilder
from minigpt4.datasets.image_finder import ImageFinder
from minigpt4.datasets.layouts import read_ocrvqa, read_refs, read_visual_genome

_FOLDERS = ("train", "train2014", "val2014", "train2017", "val2017", "")
_NAMES = (
    "{image}",
    "{basename}",
    "COCO_train2014_{image_id:0>12}.jpg",
    "COCO_val2014_{image_id:0>12}.jpg",
    "{image_id:0>12}.jpg",
    "{imageId}.jpg",  # GQA as Stanford publishes it
)


def coco_names(root: Path) -> tuple[str, ...]:
    """Patterns of COCO pictures below ``root``, the likeliest first: every name in every folder that exists."""
    folders = [f"{folder}/" if folder else "" for folder in _FOLDERS if (root / folder).is_dir()]
    return tuple(folder + name for folder in folders or [""] for name in _NAMES)


class CocoBuilder(AnnotationsBuilder):
    """Pictures of COCO, wherever below ``image_path`` and under whichever of their names."""

    def finder(self) -> ImageFinder:
        """``image_names`` when given, else every usual folder and name of COCO pictures."""
        root, names = self.image_root(), tuple(self.info().image_names)
        if not root:
            return ImageFinder(None, names or _NAMES)
        return ImageFinder(Path(root), names or coco_names(Path(root)))


@dataclass(frozen=True)
class LavisInfo(AnnotationInfo):
    """``build_info`` as LAVIS writes it, or with ``ann_path`` and ``image_path``; LAVIS's keys win over these two."""

    annotations: dict[str, Any] = field(default_factory=dict)  # `{train: {url: ..., storage: ...}}`, values or lists
    images: dict[str, Any] = field(default_factory=dict)  # `{storage: ...}`, the folder of the pictures
    image_contains: str = ""  # records whose `image` does not hold this text are left out


@registry.register("builder", "lavis")
class LavisBuilder(CocoBuilder):
    """Annotation files as LAVIS publishes them, on COCO or GQA pictures; nothing is downloaded."""

    Info: ClassVar[type[Any]] = LavisInfo
    required: ClassVar[tuple[str, ...]] = ()

    def read(self, split: str) -> Annotations:
        """Records that ``image_contains`` keeps. Raises DataError when none is left."""
        found, text = super().read(split), self.info().image_contains
        if not text:
            return found
        kept = found.filtered(lambda record: text in str(record.get("image", "")))
        if not len(kept):
            raise DataError(f"{found.paths[0]}: no record's image holds '{text}' (build_info.image_contains)")
        return kept

    def ann_paths(self, split: str) -> list[Path]:
        """``annotations.train.storage``; where that is missing a local ``url``; without both ``ann_path``."""
        info = self.info()
        if not info.annotations or (split == "val" and self.cfg.val.ann_path):
            return super().ann_paths(split)
        part = info.annotations.get("train")
        part = part if isinstance(part, dict) else {}
        storages, urls = _as_list(part.get("storage")), _as_list(part.get("url"))
        if not storages and not urls:
            raise DataError("annotations.train needs storage: one file or a list of them")
        if storages and urls and len(storages) != len(urls):
            raise DataError(f"annotations.train: {len(urls)} url, but {len(storages)} storage")
        return [_local(*pair) for pair in zip(storages or urls, urls or storages, strict=True)]

    def image_root(self) -> str:
        """``images.storage``, else ``image_path``."""
        return str(self.info().images.get("storage") or self.info().image_path)

    def _image_path_key(self) -> str:
        return "build_info.images.storage" if self.info().images.get("storage") else super()._image_path_key()


def _as_list(value: Any) -> list[str]:
    given = [value] if isinstance(value, str) else list(value or ())
    return [str(item) for item in given if item]


def _local(storage: str, url: str) -> Path:
    """The file to read of a LAVIS pair. Raises DataError that says where the file comes from."""
    if Path(storage).is_file():
        return Path(storage)
    if Path(url).is_file():
        return Path(url)
    source = f"; download it from {url}" if url != storage else ""
    raise DataError(f"annotations.train.storage: '{storage}' not found{source}")


@dataclass(frozen=True)
class ReferInfo:
    """``build_info`` of RefCOCO and its relatives."""

    ann_path: str = ""  # folder with one folder per data set, each with `refs(SPLITBY).p` and `instances.json`
    image_path: str = ""  # folder of COCO's pictures
    dataset: str = ""  # folder below ann_path: refcoco, refcoco+ or refcocog; 'inv' in front is ignored
    splitBy: str = ""  # whose split: unc, umd or google
    image_names: list[str] = field(default_factory=list)  # patterns; [] = every usual name of COCO's pictures


@registry.register("builder", "refer")
class ReferBuilder(CocoBuilder):
    """RefCOCO, RefCOCO+ and RefCOCOg: objects with a box and sentences; `val.ann_path` takes their val split."""

    Info: ClassVar[type[Any]] = ReferInfo
    required: ClassVar[tuple[str, ...]] = ("ann_path", "image_path", "dataset", "splitBy")
    has_loose_boxes: ClassVar[bool] = True

    def read(self, split: str) -> Annotations:
        """Objects of the split, one record each."""
        return read_refs(self.ann_paths(split), "val" if split == "val" and self.cfg.val.ann_path else "train")

    def ann_paths(self, split: str) -> list[Path]:
        """The file of the sentences and the file of the boxes."""
        info = self.info()
        root = Path(self.cfg.val.ann_path if split == "val" and self.cfg.val.ann_path else info.ann_path)
        folder = root / info.dataset.removeprefix("inv")
        if not folder.is_dir():
            raise DataError(f"'{folder}' not found; expected a folder with refs({info.splitBy}).p and instances.json")
        refs = folder / f"refs({info.splitBy}).p"
        if not refs.is_file() and refs.with_suffix(".json").is_file():
            refs = refs.with_suffix(".json")
        return [refs, folder / "instances.json"]


@dataclass(frozen=True)
class VisualGenomeInfo:
    """``build_info`` of Visual Genome."""

    data_dir: str = ""  # folder with image_data.json, region_descriptions.json, VG_100K/ and VG_100K_2/


@registry.register("builder", "visual_genome")
class VisualGenomeBuilder(AnnotationsBuilder):
    """Visual Genome's regions of less than 16384 pixels: a box and a phrase each."""

    Info: ClassVar[type[Any]] = VisualGenomeInfo
    required: ClassVar[tuple[str, ...]] = ("data_dir",)
    has_loose_boxes: ClassVar[bool] = True

    def check_data(self) -> list[str]:
        """The folder, and what must lie in it."""
        root = self.image_root()
        if not Path(root).is_dir():
            return [f"build_info.data_dir: '{root}' not found; expected a folder with image_data.json and VG_100K/"]
        return self._split_problems("train", "build_info.data_dir", True)

    def read(self, split: str) -> Annotations:
        """Regions, one record each. Raises DataError for a validation file: Visual Genome has no split of its own."""
        if self.cfg.val.ann_path:
            raise DataError("val.ann_path: Visual Genome has no validation file; write val: {fraction: 0.01}")
        return read_visual_genome(self.ann_paths(split))

    def ann_paths(self, split: str) -> list[Path]:
        """The file of the pictures and the file of their regions."""
        root = Path(self.image_root())
        return [root / "image_data.json", root / "region_descriptions.json"]

    def image_root(self) -> str:
        """``data_dir``."""
        return str(self.info().data_dir)

    def finder(self) -> ImageFinder:
        """The folder that a picture's address names, else the other one."""
        names = ("{image}", "VG_100K/{basename}", "VG_100K_2/{basename}", "{basename}")
        return ImageFinder(Path(self.image_root()), names)


@registry.register("builder", "ocrvqa")
class OcrVqaBuilder(AnnotationsBuilder):
    """OCR-VQA's `dataset.json`: questions on book covers, one record each; `val.ann_path` takes its val split."""

    def read(self, split: str) -> Annotations:
        """Questions of the split."""
        return read_ocrvqa(self.ann_paths(split), 2 if split == "val" and self.cfg.val.ann_path else 1)
