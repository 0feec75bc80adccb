"""Text to ids and back: Llama's SentencePiece rule exactly, and any other Hugging Face tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.chat_template import Message, render_chat

_LLAMA_SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
_SPECIAL_PATTERN = re.compile("(<s>|</s>|<unk>)")
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_LLAMA_TOKENS = {*_LLAMA_SPECIAL, "<pad>", "[PAD]"}  # fine-tuned models add a padding token, which no text holds


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

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer, ``eos_id`` and what the model's generation settings add."""

    @property
    def special(self) -> Mapping[str, int]:
        """Texts of special tokens (all but the unknown one) and their ids."""

    def render(self, messages: Sequence[Message], opens_answer: bool) -> str:
        """The conversation in the tokenizer's own chat template. Raises ConfigError when it has none."""

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

    def __init__(self, model_file: str | Path, source: str = "") -> None:
        """``source``: the directory or id that a chat template is read from; empty = where the file lies."""
        self._proto = Path(model_file).read_bytes()
        self._source = source or str(Path(model_file).parent)
        self.bos_id: int | None = 1
        self.eos_id = 2
        self.end_ids = (2,)
        self.special: Mapping[str, int] = {name: number for name, number in _LLAMA_SPECIAL.items() if number}
        self.pad_id = int(self._sp.piece_to_id("$$"))
        self.vocab_size = int(self._sp.get_piece_size())

    @cached_property
    def _sp(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(self._proto)
        except RuntimeError as error:
            raise ConfigError(f"tokenizer of '{self._source}': tokenizer.model is no SentencePiece file") from error
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

    def render(self, messages: Sequence[Message], opens_answer: bool) -> str:
        """The conversation in the chat template of the directory."""
        return render_chat(load_huggingface(self._source), messages, opens_answer)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; bytes of unknown characters are joined.

        Ids past the last piece are rows that pad an embedding table (Vicuna has one): they have no text.
        """
        return str(self._sp.decode([int(i) for i in ids if 2 < int(i) < self.vocab_size]))

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
    """Any other tokenizer of transformers (Llama 3, Qwen, Mistral, Phi, Gemma, ...).

    The id put before a text is the one the tokenizer itself puts there: none for Qwen or SmolLM, whatever their
    ``bos_token`` says. Padding is the end token: it is masked wherever it is written, and always has an embedding.
    """

    def __init__(self, path: str) -> None:
        self._tokenizer = load_huggingface(path)
        added = self._tokenizer.added_tokens_decoder
        unknown = self._tokenizer.unk_token
        self.special: Mapping[str, int] = {
            token.content: int(number)
            for number, token in added.items()
            if token.content != unknown and (token.special or token.content.strip())  # runs of spaces are no marks
        }
        ends = [self._tokenizer.eos_token_id, *_generation_ends(path)]
        self.end_ids = tuple(dict.fromkeys(int(number) for number in ends if number is not None))
        if not self.end_ids:
            raise ConfigError(f"tokenizer '{path}' has no end-of-sequence token; answers could not end")
        self.eos_id = self.pad_id = self.end_ids[0]
        start, bos = list(self._tokenizer("a")["input_ids"])[:1], self._tokenizer.bos_token_id
        self.bos_id: int | None = int(bos) if bos is not None and start == [bos] else None
        self.vocab_size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def render(self, messages: Sequence[Message], opens_answer: bool) -> str:
        """The conversation in the tokenizer's chat template."""
        return render_chat(self._tokenizer, messages, opens_answer)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` with special tokens written out."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a language-model directory or id.

    Llama's exact rule is for Llama's own vocabulary: a ``tokenizer.model`` whose ``tokenizer_class`` is Llama's or
    absent, with no special tokens of its own. Phi-3, Yi and Mistral 0.3 have the file too, and tokens of their own.
    Raises ConfigError when there is no tokenizer.
    """
    sentencepiece_file = _find(path, "tokenizer.model")
    if sentencepiece_file is not None and _follows_llama(path):
        return LlamaTokenizer(sentencepiece_file, path)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    if sentencepiece_file is None and not any(_find(path, name) for name in names):
        raise ConfigError(f"'{path}' holds no tokenizer: expected tokenizer.model or tokenizer.json")
    return HuggingFaceTokenizer(path)


def _follows_llama(path: str) -> bool:
    config = _read_json(path, "tokenizer_config.json")
    if config.get("tokenizer_class") not in (None, *_LLAMA_CLASSES):
        return False
    named = [token.get("content") for token in config.get("added_tokens_decoder", {}).values()]
    listed = [token.get("content") for token in _read_json(path, "tokenizer.json").get("added_tokens", [])]
    return {*named, *listed, *_read_json(path, "added_tokens.json")} <= _LLAMA_TOKENS


def load_huggingface(path: str) -> Any:
    """The tokenizer object of transformers. Raises ConfigError when there is none that loads.

    ``tokenizer.json`` is taken as it is: transformers 5 builds the rules of many classes anew instead, and adds padding
    tokens that the model has no embedding for.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    factory: Any = AutoTokenizer if _find(path, "tokenizer.json") is None else PreTrainedTokenizerFast
    try:
        return factory.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"tokenizer of '{path}' is not loadable: {str(error).splitlines()[0]}") from error


def _generation_ends(path: str) -> list[int]:
    """``eos_token_id`` of generation_config.json: chat models end answers with a token that is not the tokenizer's."""
    found = _read_json(path, "generation_config.json").get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def _read_json(path: str, name: str) -> dict[str, Any]:
    file = _find(path, name)
    if file is None:
        return {}
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _find(path: str, name: str) -> Path | None:
    """A file of a directory, or of a repository on the Hugging Face hub (downloaded once)."""
    directory = Path(path)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ConfigError(f"model.llama_model: '{path}': {str(error).splitlines()[0]}") from error
    return None if found is None else Path(found)
