"""The second stage of MiniGPT-4: a few thousand pictures with long captions in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig
from minigpt4.datasets.builders.annotations import AnnotationsBuilder
from minigpt4.datasets.image_finder import ImageFinder


@dataclass(frozen=True)
class AlignConfig(DatasetConfig):
    """Captions; the question comes from the model's prompt file."""

    builder: str = "align"
    format: str = "caption"


@dataclass(frozen=True)
class AlignInfo:
    """``build_info`` of this builder."""

    storage: str = ""  # folder with filter_cap.json and image/<image_id>.jpg


@registry.register("builder", "align")
class AlignBuilder(AnnotationsBuilder):
    """A folder as in MiniGPT-4's second stage: ``filter_cap.json`` and ``image/<image_id>.jpg``.

    The file reads ``{"annotations": [{"image_id": "1", "caption": "..."}]}``.
    """

    Config: ClassVar[type[DatasetConfig]] = AlignConfig
    Info: ClassVar[type[Any]] = AlignInfo
    required: ClassVar[tuple[str, ...]] = ("storage",)

    def check_data(self) -> list[str]:
        """The folder and what must lie in it."""
        root = Path(self.info().storage)
        if not root.is_dir():
            return [f"build_info.storage: '{root}' not found; expected a folder with filter_cap.json and image/"]
        if not (root / "image").is_dir():
            return [f"build_info.storage: '{root}' has no folder 'image'"]
        return self._split_problems("train", "build_info.storage", True)

    def ann_paths(self, split: str) -> list[Path]:
        """``filter_cap.json``, or the file of its own that a validation split names."""
        if split == "val" and self.cfg.val.ann_path:
            return [Path(self.cfg.val.ann_path)]
        return [Path(self.info().storage) / "filter_cap.json"]

    def sections(self) -> list[str]:
        """None: the file is one list."""
        return []

    def finder(self) -> ImageFinder:
        """``image/<image_id>.jpg``."""
        return ImageFinder(Path(self.image_root()), ("{image_id}.jpg",))

    def image_root(self) -> str:
        """``image`` below ``storage``."""
        return str(Path(self.info().storage) / "image")
