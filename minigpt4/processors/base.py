"""What a data set asks of a processor. A name in YAML selects a registered subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.schema import ProcessorConfig

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from minigpt4.common.types import Pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_IMAGE = "blip2_image_train"
DEFAULT_TEXT = "identity"


@dataclass(frozen=True)
class ImageSpec:
    """The picture a model expects: side in pixels and normalisation. Empty mean or std: those of CLIP."""

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


class ImageProcessor(ABC):
    """PIL image -> float32 [3, S, S], normalised. Objects are picklable: they travel to loader workers.

    A subclass whose last step is ``(x / 255 - mean) / std`` gives ``prepare`` too: bytes are moved and kept cheaper.
    is_random: the same picture does not always give the same pixels.
    """

    is_random: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "__call__" in cls.__dict__ and "prepare" not in cls.__dict__:
            cls.prepare = ImageProcessor.prepare  # type: ignore[method-assign]  # what was written last counts

    def __init__(self, cfg: ProcessorConfig, image: ImageSpec) -> None:
        self.cfg = cfg
        mean = tuple(cfg.mean) or tuple(image.mean) or CLIP_MEAN
        std = tuple(cfg.std) or tuple(image.std) or CLIP_STD
        if len(mean) != 3 or len(std) != 3 or 0.0 in std:
            raise ConfigError(f"vis_processor: mean and std need three numbers, std no zero; got {mean} and {std}")
        self.spec = ImageSpec(image.size, mean, std)

    def identity(self) -> str:
        """Equal for processors that make equal pixels of every picture."""
        settings = {key: value for key, value in asdict(self.cfg).items() if key not in ("name", "mean", "std")}
        return f"{type(self).__module__}.{type(self).__qualname__} {self.spec} {settings}"

    @abstractmethod
    def __call__(self, image: Image.Image) -> Tensor:
        """One picture; a training processor with augmentation gets its draws from its caller's seed."""

    def prepare(self, image: Image.Image) -> Tensor | Pixels:
        """One picture for training, where the normalisation may be left to the device."""
        return self(image)

    def fast(self) -> ImageProcessor:
        """The same with ``image_backend: fast``: pictures come undecoded. Raises ConfigError where that is unknown."""
        raise ConfigError(f"image_backend: vis_processor '{self.cfg.name}' knows 'exact' only")


class TextProcessor(ABC):
    """Text -> text."""

    def __init__(self, cfg: ProcessorConfig) -> None:
        self.cfg = cfg

    @abstractmethod
    def __call__(self, text: str) -> str:
        """``text`` cleaned."""


def make_image_processor(cfg: ProcessorConfig, image: ImageSpec) -> ImageProcessor:
    """The processor ``cfg.name`` names (the default when empty). Raises ConfigError for a text processor."""
    entry = registry.get("processor", cfg.name or DEFAULT_IMAGE)
    _expect(entry, ImageProcessor, "vis_processor", cfg.name)
    processor: ImageProcessor = entry(cfg, image)
    return processor


def make_text_processor(cfg: ProcessorConfig) -> TextProcessor:
    """The processor ``cfg.name`` names (identity when empty). Raises ConfigError for an image processor."""
    entry = registry.get("processor", cfg.name or DEFAULT_TEXT)
    _expect(entry, TextProcessor, "text_processor", cfg.name)
    processor: TextProcessor = entry(cfg)
    return processor


def _expect(entry: Any, base: type[Any], key: str, name: str) -> None:
    if isinstance(entry, type) and issubclass(entry, base):
        return
    known = [other for other in registry.names("processor") if issubclass(registry.get("processor", other), base)]
    raise ConfigError(f"{key}: '{name}' is of the other kind; allowed: {', '.join(known)}")
