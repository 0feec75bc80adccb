"""Llama's tokenisation exactly, special tokens and all."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.tokenizer import HuggingFaceTokenizer, LlamaTokenizer, load_tokenizer
from tests.golden_cases import GOLDEN, LLAMA
from tests.tiny_backbones import FAMILIES, write_tokenizer

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


def test_bos_is_what_the_tokenizer_itself_puts_in_front(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "adds", FAMILIES["gemma"])
    write_tokenizer(tmp_path / "adds_none", FAMILIES["smollm3"])  # names a bos_token all the same
    write_tokenizer(tmp_path / "has_none", FAMILIES["qwen2"])
    found = [load_tokenizer(str(tmp_path / name)).bos_id for name in ("adds", "adds_none", "has_none")]
    assert found == [1, None, None]


def test_the_ends_of_the_generation_settings_end_answers_too(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, FAMILIES["llama3"])
    tokenizer = load_tokenizer(str(tmp_path))
    ends = [tokenizer.special[text] for text in ("<|eot_id|>", "<|end_of_text|>")]
    assert tokenizer.end_ids == tuple(ends) and tokenizer.eos_id == tokenizer.pad_id == ends[0]


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, FAMILIES["gemma"], eos_token=None)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_special_tokens_in_text_become_their_ids_and_are_not_decoded(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, FAMILIES["qwen2"])
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode("A<|im_end|>B")
    assert ids[1] == tokenizer.special["<|im_end|>"] and len(ids) == 3
    assert tokenizer.decode(ids) == "AB" and tokenizer.spell(ids) == "A<|im_end|>B"


@pytest.mark.parametrize(
    ("changes", "extra", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, {}, LlamaTokenizer),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {"added_tokens.json": {"<pad>": 32000}}, LlamaTokenizer),
        ({"tokenizer_class": None}, {}, LlamaTokenizer),
        ({"tokenizer_class": "GemmaTokenizer"}, {}, HuggingFaceTokenizer),
        (
            {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"32007": {"content": "<|end|>"}}},
            {},
            HuggingFaceTokenizer,
        ),
        ({"tokenizer_class": "LlamaTokenizer"}, {"added_tokens.json": {"<image>": 32000}}, HuggingFaceTokenizer),
    ],
)
def test_the_llama_rule_is_for_llama_s_own_vocabulary(
    changes: dict[str, Any], extra: dict[str, Any], expected: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(GOLDEN / "llama_base", tmp_path / "llm")
    path = tmp_path / "llm" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    for name, content in extra.items():
        (tmp_path / "llm" / name).write_text(json.dumps(content))
    monkeypatch.setattr(HuggingFaceTokenizer, "__init__", lambda self, path: None)
    assert type(load_tokenizer(str(tmp_path / "llm"))) is expected


def test_a_tokenizer_file_is_taken_as_it_is_whatever_class_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "plain", FAMILIES["gemma"])
    write_tokenizer(tmp_path / "named", FAMILIES["gemma"], tokenizer_class="GemmaTokenizer")
    plain, named = (load_tokenizer(str(tmp_path / name)) for name in ("plain", "named"))
    assert plain.encode(" Who is this?\n<bos>x") == named.encode(" Who is this?\n<bos>x")
    assert plain.special == named.special


def test_ids_that_only_pad_the_embedding_table_have_no_text() -> None:
    tokenizer = LlamaTokenizer(LLAMA / "tokenizer.model")
    ids = tokenizer.encode("A face")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 7]) == "A face"
