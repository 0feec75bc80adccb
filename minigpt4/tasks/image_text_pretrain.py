"""Next-token loss on answers given images and instructions; every stage of MiniGPT-4 and MiniGPT-v2 trains on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from minigpt4.common.registry import registry
from minigpt4.common.types import Batch
from minigpt4.tasks.base_task import BaseTask

if TYPE_CHECKING:
    from minigpt4.models.losses import LossOutput


@registry.register("task", "image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """Trains on the tokens of answers; the loss is the model's own."""

    def loss(self, model: nn.Module, batch: Batch) -> LossOutput:
        """Token loss summed over the batch's answers."""
        output: LossOutput = model(batch)
        return output
