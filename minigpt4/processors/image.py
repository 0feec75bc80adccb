"""BLIP-2's picture preparation: squash to a square, scale, normalise."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import Pixels
from minigpt4.processors.base import ImageProcessor


@registry.register("processor", "blip2_image_train")
class Blip2ImageTrain(ImageProcessor):
    """Images: RGB, squashed to the model's square, normalised; no crop, no augmentation.

    Bicubic resize to S x S, then ``(x / 255 - mean) / std``. The bits equal those of torchvision's Resize + ToTensor +
    Normalize on PIL images: each float operation happens in float32 and in that order. ``min_scale`` and ``max_scale``
    are accepted and mean nothing, as in MiniGPT-4.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode -> [3, S, S] float32."""
        return Pixels(self._scaled(image), self.spec.mean, self.spec.std).normalised()

    def prepare(self, image: Image.Image) -> Tensor | Pixels:
        """PIL image of any mode -> [3, S, S] uint8."""
        return Pixels(self._scaled(image), self.spec.mean, self.spec.std)

    def fast(self) -> ImageProcessor:
        """JPEG files are decoded and scaled by torchvision."""
        return FastBlip2Image(self.cfg, self.spec)

    def _scaled(self, image: Image.Image) -> Tensor:
        side = self.spec.size
        rgb = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


class FastBlip2Image(Blip2ImageTrain):
    """Less than half the time for JPEG: torchvision decodes and scales bytes, bicubic and with antialiasing as Pillow.

    Pixels differ from the exact ones by one of 256 levels at most, and rarely. Other formats and CMYK go through
    Pillow and are exact. Pictures come undecoded, over a stream that holds the file.
    """

    def _scaled(self, image: Image.Image) -> Tensor:
        """Undecoded picture -> [3, S, S] uint8. Raises DataError for one that cannot be decoded."""
        pixels = self._decoded(image) if isinstance(image, JpegImageFile) and image.mode in ("RGB", "L") else None
        if pixels is not None:
            return pixels
        try:
            return super()._scaled(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"the image cannot be read: {' '.join(str(error).split())}") from error

    def _decoded(self, image: JpegImageFile) -> Tensor | None:
        """[3, S, S] uint8; None where Pillow has to tell what is wrong with the file."""
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        if image.fp is None:
            return None
        image.fp.seek(0)
        content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        try:
            pixels = decode_jpeg(content, mode=ImageReadMode.RGB)
        except RuntimeError:
            return None
        side = [self.spec.size, self.spec.size]
        scaled: Tensor = functional.resize(pixels, side, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return scaled


@registry.register("processor", "blip2_image_eval")
class Blip2ImageEval(Blip2ImageTrain):
    """Images: the same pixels as blip2_image_train."""
