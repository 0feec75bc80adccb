"""Text to ids and back: Llama's SentencePiece rule exactly, and any other Hugging Face tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from minigpt4.common.errors import ConfigError

_LLAMA_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
_SPECIAL_PATTERN = re.compile("(<s>|</s>|<unk>)")


class Tokenizer(Protocol):
    """What the encoder needs. Objects are picklable: they travel to loader workers."""

    @property
    def bos_id(self) -> int | None:
        """Id put before a sample; None when the model has none."""

    @property
    def eos_id(self) -> int:
        """Id that ends a generated answer."""

    @property
    def pad_id(self) -> int:
        """Id written on padded positions; it is never read as text."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text segment, no special tokens added; special tokens spelled in the text become their ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ids with special tokens written out, for people."""


class LlamaTokenizer:
    """The rule of Llama's original tokenizer (and of transformers 4.30, use_fast=False).

    The text is split at ``<s>``, ``</s>`` and ``<unk>``; every other chunk goes through SentencePiece on its own, so
    each gets the leading space piece. transformers 5 tokenises leading spaces and text after ``<s>`` differently.
    The padding id is the piece ``$$`` where the vocabulary has it (id 3997 in Llama's), else 0.
    """

    def __init__(self, model_file: str | Path) -> None:
        self._proto = Path(model_file).read_bytes()
        self.bos_id: int | None = 1
        self.eos_id = 2
        self.pad_id = int(self._sp.piece_to_id("$$"))
        self.vocab_size = int(self._sp.get_piece_size())

    @cached_property
    def _sp(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self._proto)
        return processor

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_sp"}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; an empty text has none."""
        ids: list[int] = []
        for chunk in _SPECIAL_PATTERN.split(text):
            if chunk in _LLAMA_SPECIAL:
                ids.append(_LLAMA_SPECIAL[chunk])
            elif chunk:
                ids.extend(self._sp.encode(chunk))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; bytes of unknown characters are joined."""
        return str(self._sp.decode([int(i) for i in ids if int(i) > 2]))

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` with ``<s>`` and ``</s>`` written out."""
        names = {number: name for name, number in _LLAMA_SPECIAL.items()}
        text, plain = "", [int(i) for i in ids]
        while plain:
            count = next((place for place, i in enumerate(plain) if i in names), len(plain))
            text += str(self._sp.decode(plain[:count])) if count else names[plain[0]]
            plain = plain[count or 1 :]
        return text


class HuggingFaceTokenizer:
    """Any tokenizer that ``AutoTokenizer`` loads (Llama 3, Qwen, Phi, ...)."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path)
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer '{path}' has no end-of-sequence token; answers could not end")
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id = int(self._tokenizer.eos_token_id)
        pad = self._tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` with special tokens written out."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a language-model directory or id.

    A directory with ``tokenizer.model`` and no ``tokenizer.json``, or of class LlamaTokenizer, follows Llama's rule.
    Raises ConfigError when the directory holds no tokenizer.
    """
    directory = Path(path)
    if not directory.is_dir():
        return HuggingFaceTokenizer(path)
    sentencepiece_file = directory / "tokenizer.model"
    if sentencepiece_file.is_file():
        return LlamaTokenizer(sentencepiece_file)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise ConfigError(f"'{path}' holds no tokenizer: expected tokenizer.model or tokenizer.json")
    return HuggingFaceTokenizer(path)
