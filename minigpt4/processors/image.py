"""BLIP-2's picture preparation: squash to a square, scale, normalise."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.registry import registry
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
        side = self.spec.size
        rgb = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()  # [3, S, S] uint8
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.spec.mean, self.spec.std))
        return pixels.float().div_(255).sub_(mean).div_(std)


@registry.register("processor", "blip2_image_eval")
class Blip2ImageEval(Blip2ImageTrain):
    """Images: the same pixels as blip2_image_train."""
