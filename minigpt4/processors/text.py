"""Cleaning of questions and captions."""

from __future__ import annotations

import re

from minigpt4.common.registry import registry
from minigpt4.processors.base import TextProcessor

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


@registry.register("processor", "blip_caption")
class BlipCaption(TextProcessor):
    """Text: lower case, some punctuation to spaces, at most ``max_words`` words; BLIP's cleaning.

    What is left stands behind ``prompt``. Published checkpoints were trained on questions in this form; '3.5' becomes
    '3 5' and 'U.S.' becomes 'u s'.
    """

    def __call__(self, text: str) -> str:
        """``text`` cleaned; applying it twice changes nothing more."""
        cleaned = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
        words = cleaned.rstrip("\n").strip(" ").split(" ")
        return self.cfg.prompt + " ".join(words[: self.cfg.max_words])


@registry.register("processor", "identity")
class Identity(TextProcessor):
    """Text: left as it is."""

    def __call__(self, text: str) -> str:
        """``text``."""
        return text
