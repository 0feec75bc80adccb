"""Llama's tokenisation exactly, special tokens and all."""

from __future__ import annotations

import json
import pickle

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.tokenizer import LlamaTokenizer, load_tokenizer
from tests.golden_cases import GOLDEN

TABLE = json.loads((GOLDEN / "tokenizer" / "tokenizer.json").read_text())


@pytest.mark.parametrize("name", ["tok", "tok_dollar"])
def test_every_recorded_string_has_the_reference_s_ids(name: str) -> None:
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer" / name))
    assert len(TABLE[name]["rows"]) == 53
    for row in TABLE[name]["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
    assert tokenizer.pad_id == TABLE[name]["pad_token_id"]


def test_decoding_leaves_special_tokens_out() -> None:
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer" / "tok"))
    for row in TABLE["tok"]["rows"]:
        assert tokenizer.decode(row["ids"]) == row["decoded_skip"], row["text"]


def test_a_tokenizer_survives_pickling() -> None:
    tokenizer = LlamaTokenizer(GOLDEN / "tokenizer" / "tok" / "tokenizer.model")
    tokenizer.encode("warm the lazy processor")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("[INST] <Img>") == tokenizer.encode("[INST] <Img>")


def test_a_directory_without_a_tokenizer_is_named(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.model or tokenizer\.json"):
        load_tokenizer(str(tmp_path))
