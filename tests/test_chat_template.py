"""A tokenizer's chat template, split once: the text around turns, and what is said when it cannot be the same."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from minigpt4 import catalog
from minigpt4.chat.loading import load_assistant
from minigpt4.chat.session import ChatSession
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import ModelConfig
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, IMAGE_TOKEN, Turn
from minigpt4.conversation.chat_template import TurnFormat, without_clock
from minigpt4.conversation.encoding import Encoder
from minigpt4.conversation.tokenizer import LlamaTokenizer
from minigpt4.models.generation import GenerateOptions
from tests.golden_cases import LLAMA
from tests.tiny_backbones import FAMILIES, tower_keys, write_llm, write_tokenizer

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = FAMILIES["qwen2"]


def encoder_of(folder: Path, end_sym: str = "auto") -> Encoder:
    return Encoder.from_config(
        ModelConfig(llama_model=str(folder), prompt_template="tokenizer", end_sym=end_sym), num_image_tokens=3
    )


def with_template(folder: Path, template: str, name: str = "qwen2") -> Path:
    write_tokenizer(folder, replace(FAMILIES[name], template=template))
    return folder


def llama2(folder: Path) -> Path:
    shutil.copytree(LLAMA, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": LLAMA2}))
    return folder


def shown(encoder: Encoder, turns: list[Turn]) -> str:
    """A sample as text; what is supervised stands in braces."""
    encoded = encoder.encode_turns(turns)
    pieces = encoder.spell(encoded.ids, encoded.labels)
    return "".join(f"{{{text}}}" if is_supervised else text for text, is_supervised in pieces)


def test_the_system_text_comes_once_and_answers_are_supervised_with_their_end(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, CHATML)
    assert shown(encoder_of(tmp_path), [Turn(f"{IMAGE_PROMPT} Who? ", "A cat."), Turn("Sure? ", "Yes.")]) == (
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n<Img>[image x 3]</Img> Who?<|im_end|>\n"
        "<|im_start|>assistant\n{A cat.<|im_end|>}\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n{Yes.<|im_end|>}"
    )


def test_a_bare_image_stays_without_text_around_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, FAMILIES["gemma"])
    encoder = encoder_of(tmp_path)
    encoded = encoder.encode_turns([Turn(IMAGE_TAG, "A cat.")])
    assert encoded.ids[:4] == [encoder.tokenizer.bos_id, *[IMAGE_TOKEN] * 3]
    assert encoder.tokenizer.spell(encoded.ids[4:]) == "A cat.<end_of_turn>"


def test_llama_2_keeps_its_exact_rule_under_its_own_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_of(llama2(tmp_path / "llama2"))
    assert isinstance(encoder.tokenizer, LlamaTokenizer)
    assert encoder.turn_format == TurnFormat(("<s>[INST] ", " [/INST]"), ("<s>[INST] ", " [/INST]"), "", " </s>")
    assert shown(encoder, [Turn("a", "b"), Turn("c", "d")]) == "<s>[INST] a [/INST]{b </s>}<s>[INST] c [/INST]{d </s>}"
    assert encoder.stop_ids == () and encoder.stop_texts == ()
    assert not caplog.records


def test_a_lead_in_front_of_answers_is_trained(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, FAMILIES["mistral"])
    encoder = encoder_of(tmp_path)
    assert shown(encoder, [Turn("a", "b")]) == "<s>[INST] a [/INST]{ b</s>}"


@pytest.mark.parametrize(
    ("call", "written"),
    [("strftime_now('%d %b %Y')", "26 Jul 2024"), ('strftime_now( "%Y-%m-%d" )', "2024-07-26"), ("x('%d')", None)],
)
def test_the_clock_of_a_template_stands_still(call: str, written: str | None) -> None:
    assert without_clock(f"{{{{ {call} }}}}") == f"{{{{ {call if written is None else repr(written)} }}}}"


def test_the_end_symbol_may_be_written_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokenizer(tmp_path, CHATML)
    encoder = encoder_of(tmp_path, end_sym="<|endoftext|>")
    assert shown(encoder, [Turn("a", "b")]).endswith("assistant\n{b<|endoftext|>}")
    assert not caplog.records


def test_a_template_that_rewrites_earlier_answers_is_told_with_an_example(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thoughtful = CHATML.template.replace(
        "{{ m['content'] }}<|im_end|>",
        "{% if m['role'] == 'assistant' and messages | length > 3 %}(thought){% endif %}{{ m['content'] }}<|im_end|>",
    )
    encoder_of(with_template(tmp_path, thoughtful))
    (record,) = caplog.records
    message = record.getMessage()
    assert "does not write a conversation turn by turn: where it has" in message
    wanted, found = message.split("training and chat here have")
    assert "(" in wanted and "(" not in found


def test_a_tokenizer_without_a_template_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no chat template; write the text around an instruction"):
        encoder_of(with_template(tmp_path, ""))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only for tools') }}", r"chat template of .* fails: only for tools"),
        ("hello", r"writes a text 0 times, expected once"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", r"model\.end_sym: .* marks no end of an answer"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "writes a text 2 times"),
    ],
)
def test_a_template_that_cannot_be_split_is_an_error(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_of(with_template(tmp_path, template))


def test_a_template_without_special_tokens_ends_answers_by_its_text(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    encoder = encoder_of(with_template(tmp_path, plain))
    assert (encoder.end_sym, encoder.stop_texts) == ("\n\n", ("\n\n",))
    assert encoder.stop_ids == encoder.tokenizer.end_ids[1:]


@pytest.mark.parametrize(
    ("end_sym", "ids", "texts"),
    [("auto", (3,), ()), ("<|im_start|>", (3, 2), ()), ("###", (3,), ("###",)), ("", (3,), ())],
)
def test_special_end_symbols_stop_by_id_and_others_by_text(
    end_sym: str, ids: tuple[int, ...], texts: tuple[str, ...], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, CHATML)
    cfg = ModelConfig(llama_model=str(tmp_path), prompt_template="{}", end_sym=end_sym)
    encoder = Encoder.from_config(cfg, num_image_tokens=1)
    assert (encoder.stop_ids, encoder.stop_texts) == (ids, texts)


def test_end_sym_auto_without_the_template_is_the_end_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, CHATML)
    cfg = ModelConfig(llama_model=str(tmp_path), prompt_template="Q: {} A:", end_sym="auto")
    assert Encoder.from_config(cfg, num_image_tokens=1).end_sym == "<|endoftext|>"


def test_the_template_goes_with_an_end_of_its_own() -> None:
    with pytest.raises(ConfigError, match="prompt_template tokenizer goes with end_sym auto"):
        ModelConfig(prompt_template="tokenizer")


def test_an_encoder_travels_to_loader_workers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, CHATML)
    encoder = encoder_of(tmp_path)
    turns = [Turn("Who? ", "A cat.")]
    assert pickle.loads(pickle.dumps(encoder)).encode_turns(turns) == encoder.encode_turns(turns)


def test_a_chat_sends_the_ids_of_training(tmp_path: Path) -> None:
    catalog.load()
    keys = {"llama_model": str(write_llm(tmp_path / "llm", CHATML)), "prompt_template": "tokenizer", "end_sym": "auto"}
    content = {"model": {"arch": "minigpt_v2", "model_type": "pretrain", "lora_r": 0, **keys, **tower_keys("siglip")}}
    path = tmp_path / "chat.yaml"
    path.write_text(yaml.safe_dump({**content, "datasets": {}, "run": {}}), encoding="utf-8")
    assistant = load_assistant(cfg_path=str(path), device=torch.device("cpu"))
    session = ChatSession(assistant)
    session.set_image(Image.new("RGB", (9, 7)))
    options = GenerateOptions(max_new_tokens=4)
    answers = [session.ask(question, options) for question in ("Who?", "Sure?")]
    encoder = assistant.model.encoder
    trained = encoder.encode_turns([Turn(f"{IMAGE_PROMPT} Who? ", answers[0]), Turn("Sure? ", answers[1])])
    asked = encoder.encode_prompt(session.history[:1], session.history[1].prompt)
    assert trained.ids[: len(asked.ids)] == asked.ids
    end = encoder.tokenizer.special["<|im_end|>"]
    assert assistant.image_processor.spec.mean == (0.5, 0.5, 0.5)  # SigLIP's
    assert assistant.template == "training" and assistant.stopping(options).stop == () and end in encoder.stop_ids
