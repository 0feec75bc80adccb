"""The face data sets: ShareGPT4V's faces, GPT-4V's answers by section, emotions as a mapping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig
from minigpt4.datasets.builders.annotations import AnnotationInfo, AnnotationsBuilder


@dataclass(frozen=True)
class ShareGPTFaceConfig(DatasetConfig):
    """Conversations about pictures from many sources."""

    builder: str = "ShareGPT_Face"
    format: str = "conversation"


@registry.register("builder", "ShareGPT_Face")
class ShareGPT_Face(AnnotationsBuilder):
    """ShareGPT4V conversations; pictures lie below one folder with coco/, llava/, sam/ and the others."""

    Config: ClassVar[type[DatasetConfig]] = ShareGPTFaceConfig


@dataclass(frozen=True)
class FaceGPT4VisionConfig(DatasetConfig):
    """Conversations in named sections."""

    builder: str = "FaceGPT4Vision"
    format: str = "conversation"


@dataclass(frozen=True)
class SectionInfo(AnnotationInfo):
    """``build_info`` of files in sections. Those that judge race, gender or skin are used when named only."""

    subsets_prompts: list[str] = field(default_factory=list)  # names of the sections to train on


@registry.register("builder", "FaceGPT4Vision")
class FaceGPT4Vision(AnnotationsBuilder):
    """Annotation files in named sections, ``{"section": [records]}``; YAML names the sections to train on.

    They come in the order of ``subsets_prompts``; spaces around names are ignored.
    """

    Config: ClassVar[type[DatasetConfig]] = FaceGPT4VisionConfig
    Info: ClassVar[type[Any]] = SectionInfo
    required: ClassVar[tuple[str, ...]] = ("ann_path", "subsets_prompts")

    def sections(self) -> list[str]:
        """``subsets_prompts``, then ``sections``."""
        return list(dict.fromkeys([*(name.strip() for name in self.info().subsets_prompts), *super().sections()]))


@dataclass(frozen=True)
class RealisticEmotionsConfig(DatasetConfig):
    """Image path -> text that begins with the emotion."""

    builder: str = "RealisticEmotions"
    format: str = "mapping"


@registry.register("builder", "RealisticEmotions")
class RealisticEmotions(AnnotationsBuilder):
    """One file of image path -> text that begins with the emotion, ``{"a.jpg": "Happy, ..."}``."""

    Config: ClassVar[type[DatasetConfig]] = RealisticEmotionsConfig
