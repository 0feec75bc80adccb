"""Positions are computed once in a conversation, answers stay the same, and old turns leave a full window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MistralConfig, Qwen2Config, Qwen2ForCausalLM
from transformers import MambaForCausalLM as Mamba
from transformers import MistralForCausalLM as Mistral

from minigpt4 import catalog
from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import ChatSession
from minigpt4.common.errors import DataError
from minigpt4.common.schema import ProcessorConfig
from minigpt4.common.types import Turn
from minigpt4.conversation.tokenizer import LlamaTokenizer
from minigpt4.models.attention import use_packed_attention
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.models.prompt_cache import PromptCache, keeps_positions
from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor
from tests.golden_cases import LLAMA, build_model, load_case

VICUNA, LLAMA2, V2 = "a_minigpt4_qformer_vicuna", "b_minigpt4_noqformer_llama2", "c_minigptv2_lora_instruction"
QUESTIONS = ("what is the emotion of the person?", "why?", "is the mouth open?", "who else is in the picture?")
SHORT = GenerateOptions(max_new_tokens=12)


@cache
def assistant(case_name: str, template: str, speaks_words: bool = False) -> Assistant:
    """A tiny random model; one that ``speaks_words`` picks whole words only, whose text tokenises to the same ids."""
    catalog.load()
    model = build_model(load_case(case_name))
    assert isinstance(model, GenerationMixin)
    if speaks_words:
        pieces = LlamaTokenizer(LLAMA / "tokenizer.model")._sp
        spoken = [i for i in range(3, 600) if pieces.id_to_piece(i)[:1] == "▁" and pieces.id_to_piece(i)[3:].isalpha()]
        silent = torch.ones(600, dtype=torch.bool)
        silent[spoken] = False
        with torch.no_grad():
            model._lm.lm_head.weight[silent] = 0
    spec = ImageSpec(model.cfg.image_size, model.image_mean, model.image_std)
    image = make_image_processor(ProcessorConfig(name="blip2_image_eval"), spec)
    return Assistant(model, image, make_text_processor(ProcessorConfig()), template)


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


@pytest.fixture
def fed() -> Iterator[Callable[[GenerationMixin], list[int]]]:
    """Starts to count the positions that go through the language model of an assistant, per call of its decoder."""
    hooks = []

    def watch(model: GenerationMixin) -> list[int]:
        counts: list[int] = []

        def note(module: nn.Module, arguments: Any, options: Any) -> None:
            given = options.get("inputs_embeds") if options.get("input_ids") is None else options["input_ids"]
            counts.append(given.shape[1])

        hooks.append(model._lm.get_decoder().register_forward_pre_hook(note, with_kwargs=True))
        return counts

    yield watch
    for hook in hooks:
        hook.remove()


ALL = [
    (VICUNA, "vicuna_v0"),
    (LLAMA2, "llama2"),
    (V2, "minigpt_v2"),
    (V2, "minigpt_v2_legacy"),
    (LLAMA2, "training"),
    (V2, "training"),
]


@pytest.mark.parametrize("speaks_words", [False, True])
@pytest.mark.parametrize(("case_name", "template"), ALL)
def test_greedy_ids_with_kept_positions_are_those_without(case_name: str, template: str, speaks_words: bool) -> None:
    talker = assistant(case_name, template, speaks_words)
    model, options = talker.model, talker.stopping(SHORT)
    session, kept = ChatSession(talker), PromptCache()
    session.set_image(picture())
    reused = []
    for question in QUESTIONS:
        turn, prompt = session._fitting_prompt(question, SHORT)
        with torch.no_grad():
            embeddings, mask = model._left_padded([prompt], session._features)
            held = kept.take(prompt.ids, session._features, model.encoder.num_image_tokens)
            reused.append(held.get_seq_length())
            with_kept = model._run(embeddings, mask, options, held=held)[0].tolist()
            without = model._run(embeddings, mask, options)[0].tolist()
        assert with_kept == without
        kept.put_back(held, prompt.ids + with_kept, session._features)
        session._remember(turn, model.generate([prompt], session._features, options)[0])
    assert reused[0] == 0 and all(now > before for before, now in pairwise(reused[1:]))


@pytest.mark.parametrize(("case_name", "template"), ALL)
def test_a_session_answers_as_one_that_computes_everything_again(case_name: str, template: str) -> None:
    talker = assistant(case_name, template)
    session = ChatSession(talker)
    session.set_image(picture())
    for question in QUESTIONS:
        history, new_images = list(session.history), session._num_new_images
        answer = session.ask(question, SHORT)
        fresh = ChatSession(talker)
        fresh.set_image(picture())
        fresh.history, fresh._num_new_images = history, new_images
        assert fresh.ask(question, SHORT) == answer


def test_a_turn_computes_its_new_positions_only(fed: Callable[[GenerationMixin], list[int]]) -> None:
    talker = assistant(V2, "minigpt_v2", speaks_words=True)
    session, counts = ChatSession(talker), fed(talker.model)
    session.set_image(picture())
    known = 0
    for question in QUESTIONS:
        prompt = session._fitting_prompt(question, SHORT)[1]
        counts.clear()
        session.ask(question, SHORT)
        assert counts == [len(prompt.ids) - known, *[1] * 11]
        known = len(prompt.ids) + 11  # the last of the 12 ids was never fed


def test_another_picture_is_never_answered_from_the_positions_of_the_first(
    fed: Callable[[GenerationMixin], list[int]],
) -> None:
    model = assistant(V2, "minigpt_v2").model
    counts, kept = fed(model), PromptCache()
    prompt = ChatSession.first_prompt(assistant(V2, "minigpt_v2"), "who?")
    pictures = torch.randn(2, 1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    image_start = prompt.ids.index(-200)
    for images, expected in ((pictures[0], len(prompt.ids)), (pictures[0], 1), (pictures[1], None)):
        counts.clear()
        streamed = "".join(model.generate_stream(prompt, images, SHORT, kept))
        assert streamed == model.generate([prompt], images, SHORT)[0]
        assert counts[0] == (len(prompt.ids) - image_start if expected is None else expected)


def test_an_answer_that_fails_leaves_nothing_behind() -> None:
    model, kept = assistant(V2, "minigpt_v2").model, PromptCache()
    prompt = ChatSession.first_prompt(assistant(V2, "minigpt_v2"), "who?")
    images = torch.zeros(1, 3, 112, 112)
    expected = "".join(model.generate_stream(prompt, images, SHORT, kept))
    layer = model._lm.model.layers[1]

    def fail(module: nn.Module, arguments: Any) -> None:
        raise RuntimeError("out of memory")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.generate_stream(prompt, images, SHORT, kept))
    hook.remove()
    assert kept.ids == []
    assert "".join(model.generate_stream(prompt, images, SHORT, kept)) == expected


def test_beams_compute_every_position_and_leave_the_kept_ones_alone(
    fed: Callable[[GenerationMixin], list[int]],
) -> None:
    talker = assistant(V2, "minigpt_v2")
    session, counts = ChatSession(talker), fed(talker.model)
    session.set_image(picture())
    session.ask(QUESTIONS[0], SHORT)
    prompt = session._fitting_prompt(QUESTIONS[1], SHORT)[1]
    kept = list(session._cache.ids)
    counts.clear()
    answer = session.ask(QUESTIONS[1], replace(SHORT, num_beams=2))
    assert counts[0] == len(prompt.ids) and session._cache.ids == kept
    assert answer == talker.model.generate([prompt], session._features, replace(SHORT, num_beams=2))[0]


SIZES = {"vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 3}
HEADS = {**SIZES, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mistral(MistralConfig(sliding_window=8, **HEADS)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=8, head_dim=16, layer_types=MIXED, **HEADS)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**HEADS)),
    ],
    ids=["sliding", "mixed", "grouped"],
)
def test_other_language_models_keep_positions_too(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    llm, generator, kept = build().eval(), torch.Generator().manual_seed(0), PromptCache()
    use_packed_attention(llm)
    assert keeps_positions(llm)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # answers of untrained models hardly depend on the prompt
    ids = torch.randint(3, 600, (30,), generator=generator).tolist()
    for turn in range(3):
        options = {
            "inputs_embeds": llm.get_input_embeddings()(torch.tensor([ids])).detach(),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "max_new_tokens": 12,
            "do_sample": False,
            "use_cache": True,
            "eos_token_id": 599,
            "pad_token_id": 0,
        }
        held = kept.take(ids, torch.zeros(0), 1)
        assert held.get_seq_length() == (0, 41, 45)[turn]
        answer = llm.generate(past_key_values=held, **options)[0].tolist()
        assert answer == llm.generate(**options)[0].tolist()
        kept.put_back(held, ids + answer, torch.zeros(0))
        ids = ids + answer + torch.randint(3, 600, (5,), generator=generator).tolist()
        if turn == 1:
            ids[45] = 3 + (ids[45] == 3)  # an answer that was tokenised anew, differently


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mamba(MambaConfig(**SIZES)),
        lambda: Qwen2ForCausalLM(Qwen2Config(rope_parameters=DYNAMIC, **HEADS)),
    ],
    ids=["running state", "changing positions"],
)
def test_models_whose_past_cannot_be_cut_compute_everything_again(build: Callable[[], Any]) -> None:
    assert not keeps_positions(build())


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def test_such_a_model_still_answers(
    monkeypatch: pytest.MonkeyPatch, fed: Callable[[GenerationMixin], list[int]]
) -> None:
    talker = assistant(V2, "minigpt_v2")
    monkeypatch.setattr("minigpt4.models.generation.keeps_positions", lambda llm: False)
    session, counts = ChatSession(talker), fed(talker.model)
    session.set_image(picture())
    session.ask(QUESTIONS[0], SHORT)
    prompt = session._fitting_prompt(QUESTIONS[1], SHORT)[1]
    counts.clear()
    session.ask(QUESTIONS[1], SHORT)
    assert counts[0] == len(prompt.ids)


def test_old_turns_leave_a_full_window_and_the_picture_stays() -> None:
    talker = assistant(VICUNA, "vicuna_v0", speaks_words=True)
    notices: list[str] = []
    session = ChatSession(talker, notices.append)
    session.set_image(picture())
    lengths = []
    for question in ("who 1?", "who 2?", "who 3?", "who 4?"):
        session.ask(question, SHORT)
        lengths.append(len(session._fitting_prompt("and now?", SHORT)[1].ids))
    limit = lengths[1] + SHORT.max_new_tokens  # room for two turns and the question, not for four
    turn, prompt = session._fitting_prompt("and now?", replace(SHORT, max_length=limit))
    assert notices == [f"the conversation outgrew the window of {limit}: its oldest turns (2) are gone"]
    assert turn == "and now?"
    assert [turn.prompt for turn in session.history] == ["<Img><ImageHere></Img> who 3?", "who 4?"]
    assert len(prompt.ids) + SHORT.max_new_tokens <= limit and prompt.num_images == 1
    text = talker.model.encoder.tokenizer.decode([i for i in prompt.ids if i >= 0])
    assert text.startswith("Give the following image")  # the system text


def test_the_picture_of_the_last_turn_moves_to_the_question() -> None:
    talker = assistant(V2, "minigpt_v2")
    session = ChatSession(talker, lambda notice: None)
    session.set_image(picture())
    session.ask(QUESTIONS[0], SHORT)
    alone = len(ChatSession.first_prompt(talker, "and now?").ids)
    options = replace(SHORT, max_length=alone + SHORT.max_new_tokens)
    turn, prompt = session._fitting_prompt("and now?", options)
    assert turn == "<Img><ImageHere></Img> and now? " and prompt.num_images == 1
    fresh = ChatSession(talker)
    fresh.set_image(picture())
    assert session.ask("and now?", options) == fresh.ask("and now?", options)
    assert session.history == fresh.history


def test_the_window_is_the_language_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    talker = assistant(V2, "minigpt_v2")
    assert talker.model.context_window == 2048
    monkeypatch.setattr(talker.model._lm.config, "max_position_embeddings", 60)
    session = ChatSession(talker, lambda notice: None)
    session.set_image(picture())
    for question in ("who?", "why?", "where?", "when?"):
        session.ask(question, SHORT)
        assert len(session._cache.ids) <= 60
    assert 0 < len(session.history) < 4


def test_a_question_that_does_not_fit_is_refused_and_forgotten() -> None:
    session = ChatSession(assistant(V2, "minigpt_v2"))
    session.set_image(picture())
    session.ask("who?", SHORT)
    before = list(session.history)
    with pytest.raises(
        DataError, match=r"takes \d+ positions \(16 of them show pictures\), but the window of 60 has 48"
    ):
        session.ask("why " * 40, replace(SHORT, max_length=60))
    assert session.history == before and session.ask("why?", SHORT)


def test_no_turn_is_dropped_while_all_fit() -> None:
    notices: list[str] = []
    session = ChatSession(assistant(V2, "minigpt_v2"), notices.append)
    session.history = [Turn("a ", "b")] * 5
    prompt = session._fitting_prompt("c", SHORT)[1]
    session._fitting_prompt("c", replace(SHORT, max_length=len(prompt.ids) + SHORT.max_new_tokens))
    assert notices == [] and len(session.history) == 5
