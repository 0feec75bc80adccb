"""Keys and values in memory that stays in place: the same ids as with memory that grows, in batches and in chats."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from minigpt4.chat.session import ChatSession
from minigpt4.common.errors import ConfigError
from minigpt4.models.decoding import COMPILE_AFTER, Decoding, unfit
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from tests.golden_cases import load_case
from tests.test_chat_cache import QUESTIONS, V2, assistant, picture

SHORT = GenerateOptions(max_new_tokens=12)
STATIC = replace(SHORT, decoding="static")
COMPILED = replace(SHORT, decoding="compiled")


def ids_of(model: GenerationMixin, options: GenerateOptions) -> list[list[int]]:
    """Greedy ids of prompts of different lengths about different pictures."""
    case = load_case(V2)
    prompts = [model.encoder.encode_text(text) for text in case.meta["generate"]["texts"]]
    with torch.no_grad():
        ids: list[list[int]] = model._run(*model._left_padded(prompts, case.tensor("gen_images")), options).tolist()
    return ids


def talk(options: GenerateOptions) -> tuple[list[str], list[int]]:
    """Answers of a conversation, and how many positions went through the decoder in each of its calls."""
    talker = assistant(V2, "minigpt_v2", speaks_words=True)
    counts: list[int] = []

    def note(module: nn.Module, arguments: Any, given: dict[str, Any]) -> None:
        shown = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        assert shown is not None
        counts.append(shown.shape[1])

    session = ChatSession(talker)
    session.set_image(picture())
    hook = talker.model._lm.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        return [session.ask(question, options) for question in QUESTIONS], counts
    finally:
        hook.remove()


def test_a_padded_batch_has_the_same_ids_in_memory_that_stays_in_place() -> None:
    model = assistant(V2, "minigpt_v2").model
    expected = ids_of(model, SHORT)
    assert len({len(prompt) for prompt in load_case(V2).meta["generate"]["texts"]}) > 1
    assert ids_of(model, STATIC) == expected
    fixed = model._decoding._fixed
    assert ids_of(model, STATIC) == expected and model._decoding._fixed is fixed


def test_a_chat_computes_only_new_positions_in_memory_that_stays_in_place() -> None:
    assert talk(STATIC) == talk(SHORT)


def test_prompts_that_share_their_start_have_the_same_ids_too() -> None:
    model = assistant(V2, "minigpt_v2").model
    prompts = [model.encoder.encode_prompt([], f"<Img><ImageHere></Img> {question} ") for question in QUESTIONS]
    images = torch.zeros(len(prompts), 3, 112, 112)
    assert model._shared_start(prompts, images, SHORT)
    assert model.generate(prompts, images, STATIC) == model.generate(prompts, images, SHORT)


@pytest.mark.slow
def test_a_compiled_step_has_the_same_ids_in_batches_and_chats() -> None:
    talker = assistant(V2, "minigpt_v2", speaks_words=True)
    assert ids_of(talker.model, COMPILED) == ids_of(talker.model, SHORT)
    answers = []
    for options in (COMPILED, SHORT):
        session = ChatSession(talker)
        session.set_image(picture())
        answers.append([session.ask(question, options) for question in QUESTIONS])
    assert answers[0] == answers[1]


def test_beams_go_on_as_before_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = assistant(V2, "minigpt_v2").model
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert ids_of(model, replace(STATIC, num_beams=2)) == ids_of(model, replace(SHORT, num_beams=2))
    assert caplog.text.count("beams are sorted anew") == 1


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)), "keeps a state"),
        (lambda: MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES)), "sliding window"),
        (lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **SIZES)), ""),
    ],
    ids=["state", "window", "plain"],
)
def test_models_whose_memory_cannot_stay_in_place_say_why(build: Any, reason: str) -> None:
    found = unfit(build())
    assert reason in found and bool(found) == bool(reason)


def test_auto_compiles_on_a_gpu_once_that_pays() -> None:
    lm = assistant(V2, "minigpt_v2").model._lm
    on_gpu: Any = SimpleNamespace(
        device=torch.device("cuda"), config=lm.config, _is_stateful=False, _can_compile_fullgraph=True
    )
    decoding = Decoding()
    assert decoding.choose("auto", on_gpu, 1) == "dynamic"
    decoding.steps = COMPILE_AFTER
    assert decoding.choose("auto", on_gpu, 1) == "compiled"
    assert decoding.choose("auto", lm, 1) == "dynamic"
    assert decoding.choose("dynamic", on_gpu, 1) == "dynamic"


def test_an_unknown_way_to_decode_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="decoding must be one of auto, dynamic, static, compiled; got 'fast'"):
        GenerateOptions(decoding="fast")
