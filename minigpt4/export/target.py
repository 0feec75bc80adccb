"""What every export target is: a check, a writer, a way back from the files, and how a reader loads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minigpt4.export.source import Source, public_name

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.export.example import Example, Outputs


@dataclass(frozen=True)
class Facts:
    """What the cards say of a model that is no longer in memory."""

    num_image_tokens: int
    feature_width: int
    dtype: torch.dtype
    prompt: str
    has_bos: bool
    stop: tuple[str, ...]
    trained: dict[str, int]
    has_other_tensors: bool


class Target(ABC):
    """One value of ``--to``."""

    name: str
    casts = False
    """Whether the language model is written, in the dtype that was asked for."""
    has_vision = False
    """Whether the files hold the vision tower; without it the check starts at its features."""
    hint = ""
    """Added to the error of a check that failed."""

    @abstractmethod
    def refuse(self, source: Source) -> None:
        """Raises ConfigError when the configuration cannot be exported this way, and says what can."""

    @abstractmethod
    def write(self, source: Source, assistant: Assistant, folder: Path, dtype: torch.dtype) -> None:
        """Write all files into ``folder``. May merge LoRA and cast the model in place."""

    @abstractmethod
    def reload(self, source: Source, folder: Path, example: Example) -> Outputs:
        """What the files answer, read into fresh objects."""

    @abstractmethod
    def usage(self, source: Source, facts: Facts) -> str:
        """Markdown: how to load the files."""


def base_name(source: Source) -> str:
    """The language model for cards and snippets."""
    return public_name(source.model.llama_model)
