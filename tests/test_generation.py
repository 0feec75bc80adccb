"""Answers: where they end, what the options do, and how text comes out of ids piece by piece."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigpt4 import catalog
from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import ChatSession
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import ProcessorConfig
from minigpt4.common.types import IMAGE_TOKEN, Encoded, Turn
from minigpt4.conversation.tokenizer import LlamaTokenizer
from minigpt4.models.answer_text import TextStreamer, clean_answer
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.models.prompt_cache import PromptCache
from minigpt4.processors.base import ImageSpec, make_image_processor, make_text_processor
from tests.golden_cases import GOLDEN, LLAMA, build_model, load_case

V2 = "c_minigptv2_lora_instruction"
SHORT = GenerateOptions(max_new_tokens=12)


@pytest.fixture
def model() -> GenerationMixin:
    built = build_model(load_case(V2))
    assert isinstance(built, GenerationMixin)
    return built


@pytest.fixture
def prompts(model: GenerationMixin) -> list[Encoded]:
    return [model.encoder.encode_text(text) for text in load_case(V2).meta["generate"]["texts"]]


@pytest.fixture
def images() -> torch.Tensor:
    return load_case(V2).tensor("gen_images")


def ids_of(model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor, options: GenerateOptions) -> Any:
    with torch.no_grad():
        return model._run(*model._left_padded(prompts, images), options).tolist()


def with_end_token_row(model: GenerationMixin, row: list[float]) -> None:
    with torch.no_grad():
        model._lm.lm_head.weight[2] = torch.tensor(row)


@pytest.mark.parametrize("case", ["eos_first", "eos_in_one_row"])
def test_answers_end_at_the_end_token_as_in_the_reference(
    case: str, model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor
) -> None:
    golden = json.loads((GOLDEN / "generate_eos" / "eos.json").read_text())[case]
    with_end_token_row(model, golden["eos_row"])
    for ids, expected in zip(ids_of(model, prompts, images, SHORT), golden["raw_ids"], strict=True):
        expected = expected[1:]  # the reference's library put a BOS in front that was never fed
        end = expected.index(2) + 1 if 2 in expected else len(expected)
        assert ids[:end] == expected[:end]
    assert model.generate(prompts, images, SHORT) == golden["answers"]
    assert "".join(model.generate_stream(prompts[0], images[:1], SHORT)) == golden["answers"][0]


def test_min_new_tokens_holds_the_end_token_back(
    model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor
) -> None:
    with_end_token_row(model, json.loads((GOLDEN / "generate_eos" / "eos.json").read_text())["eos_first"]["eos_row"])
    ids = ids_of(model, prompts, images, replace(SHORT, min_new_tokens=5))
    assert all(2 not in row[:5] and len(row) > 5 for row in ids)


def test_an_answer_ends_at_a_stop_id(model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor) -> None:
    free = ids_of(model, prompts[:1], images[:1], SHORT)[0]
    end = free[4]
    options = replace(SHORT, stop_ids=(end,))
    stopped = ids_of(model, prompts[:1], images[:1], options)[0]
    assert stopped == free[: free.index(end) + 1]
    decoded = model.encoder.tokenizer.decode(free[: free.index(end)])
    assert model.generate(prompts[:1], images[:1], options) == [decoded.strip()]
    assert "".join(model.generate_stream(prompts[0], images[:1], options)) == decoded.strip()


def test_advice_in_the_language_model_s_folder_changes_nothing(
    model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor
) -> None:
    expected = ids_of(model, prompts, images, SHORT)
    advice = model._lm.generation_config
    advice.repetition_penalty, advice.no_repeat_ngram_size, advice.suppress_tokens = 5.0, 1, [expected[0][0]]
    assert ids_of(model, prompts, images, SHORT) == expected
    assert model._lm.generation_config is advice


def test_a_narrow_nucleus_or_one_word_to_choose_from_is_greedy(
    model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor
) -> None:
    greedy = ids_of(model, prompts, images, SHORT)
    for change in ({"top_p": 1e-6}, {"top_k": 1}, {"temperature": 1e-4}):
        options = replace(SHORT, do_sample=True, temperature=change.pop("temperature", 1.0), **change)
        assert ids_of(model, prompts, images, options) == greedy
    wide = replace(SHORT, do_sample=True, temperature=5.0, top_p=1.0, top_k=0, seed=1)
    assert ids_of(model, prompts, images, wide) != greedy


def log_probability(model: GenerationMixin, prompt: Encoded, image: torch.Tensor, ids: list[int]) -> float:
    sample = Encoded(prompt.ids + ids, [], 1)
    with torch.no_grad():
        embeddings, mask = model._left_padded([sample], image)
        logits = model._lm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[0]
    steps = logits[len(prompt.ids) - 1 : -1].log_softmax(-1)
    return float(steps[range(len(ids)), ids].sum())


def test_beams_find_a_likelier_answer_than_greedy(
    model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor
) -> None:
    greedy = ids_of(model, prompts[:1], images[:1], SHORT)[0]
    beams = ids_of(model, prompts[:1], images[:1], replace(SHORT, num_beams=5))[0]
    assert log_probability(model, prompts[0], images[:1], beams) > log_probability(
        model, prompts[0], images[:1], greedy
    )


def test_the_length_penalty_makes_beams_answer_longer(
    model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor
) -> None:
    with_end_token_row(model, [0.2 * x for x in _eos_row()])
    lengths = []
    for penalty in (-5.0, 5.0):
        ids = ids_of(model, prompts[:1], images[:1], replace(SHORT, num_beams=4, length_penalty=penalty))[0]
        lengths.append(len(ids))
    assert lengths[0] < lengths[1]


def _eos_row() -> list[float]:
    row: list[float] = json.loads((GOLDEN / "generate_eos" / "eos.json").read_text())["eos_first"]["eos_row"]
    return row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_p": 1.5}, "top_p must be > 0 and <= 1, got 1.5"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be > 0, got nan"),
        ({"min_new_tokens": 20}, "min_new_tokens 20 is more than max_new_tokens 12"),
        ({"max_length": 12}, "max_length 12 leaves no room for a question before 12 new tokens"),
    ],
)
def test_impossible_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SHORT, **change)


def streamed(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """Pieces shown for ``ids``, and the whole answer."""
    streamer = TextStreamer(LlamaTokenizer(LLAMA / "tokenizer.model"), stop, ())
    streamer.put(torch.tensor([], dtype=torch.long))
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
    return list(streamer), streamer.answer


def test_pieces_joined_are_the_decoded_text() -> None:
    tokenizer, draw = LlamaTokenizer(LLAMA / "tokenizer.model"), random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(40)]  # stray bytes included
        pieces, answer = streamed(ids)
        assert "".join(pieces) == answer == clean_answer(tokenizer.decode(ids))


@pytest.mark.parametrize("text", ["été 😀 fin", "a  b   c", " {<10><20>}\n- two\n", "A man. Assist him [INST"])
def test_text_comes_out_whole(text: str) -> None:
    ids = LlamaTokenizer(LLAMA / "tokenizer.model").encode(text)
    pieces, answer = streamed([*ids, 2])
    assert "".join(pieces) == answer == text.strip()
    assert len(pieces) >= 3 and not any("\ufffd" in piece for piece in pieces)


def test_a_stop_text_is_never_shown() -> None:
    tokenizer = LlamaTokenizer(LLAMA / "tokenizer.model")
    pieces, answer = streamed(tokenizer.encode("Sad # 1.###Human: why?"), ("###",))
    assert "".join(pieces) == answer == "Sad # 1."


def test_what_was_shown_stays_when_it_could_have_begun_the_stop_text() -> None:
    tokenizer = LlamaTokenizer(LLAMA / "tokenizer.model")
    pieces, answer = streamed([*tokenizer.encode("Sad b"), *tokenizer.encode("b c")], ("b c",))
    assert "".join(pieces) == answer == "Sad b"


def test_a_repeated_role_marker_in_front_is_never_shown() -> None:
    tokenizer = LlamaTokenizer(LLAMA / "tokenizer.model")
    pieces, answer = streamed(tokenizer.encode("Assistant: A man"))
    assert "".join(pieces) == answer == "A man"


def test_an_answer_that_starts_again_is_shown_on_a_new_line() -> None:
    tokenizer = LlamaTokenizer(LLAMA / "tokenizer.model")
    pieces, answer = streamed(tokenizer.encode("Sad Assistant: A man"))
    assert "".join(pieces) == "Sad\nA man" and answer == "A man"


def test_a_long_answer_costs_no_more_per_token_than_a_short_one() -> None:
    tokenizer = LlamaTokenizer(LLAMA / "tokenizer.model")
    decoded = []

    class Counting(LlamaTokenizer):
        def decode(self, ids: Any) -> str:
            decoded.append(len(ids))
            return super().decode(ids)

    streamer = TextStreamer(Counting(LLAMA / "tokenizer.model"), (), ())
    for i in tokenizer.encode("The person looks sad. " * 60):
        streamer.put(torch.tensor([i]))
    assert max(decoded) < 10


@pytest.mark.parametrize(
    ("chat", "template", "case_name"),
    [
        ("Vicuna0", "vicuna_v0", "a_minigpt4_qformer_vicuna"),
        ("LLama2", "llama2", "b_minigpt4_noqformer_llama2"),
        ("minigptv2", "minigpt_v2_legacy", V2),
    ],
)
def test_published_conversations_have_the_reference_s_ids_and_answers(chat: str, template: str, case_name: str) -> None:
    catalog.load()
    golden = json.loads((GOLDEN / "chat" / "chat.json").read_text())[chat]
    pixels = load_file(GOLDEN / "chat" / f"{chat}.safetensors")["image"]
    model = build_model(load_case(case_name))
    assert isinstance(model, GenerationMixin)
    image_processor = make_image_processor(ProcessorConfig(name="blip2_image_eval"), ImageSpec(112))
    session = ChatSession(Assistant(model, image_processor, make_text_processor(ProcessorConfig()), template))
    session._features, session._num_new_images = pixels if pixels.dim() == 4 else pixels[None], 1
    kept, options = PromptCache(), replace(SHORT, repetition_penalty=1.05)
    questions = ("What is the emotion shown by the person in the photo?", "Why do you think so?")
    for question, turn in zip(questions, ("turn1", "turn2"), strict=True):
        message, prompt = session._fitting_prompt(question, options)
        texts = [i for i in prompt.ids if i != IMAGE_TOKEN]
        assert texts == [i for segment in golden[f"segments_{turn}"] for i in segment["ids"]]
        assert len(prompt.ids) == golden[f"embs_len_{turn}"]
        list(model.generate_stream(prompt, session._features, options, kept))
        expected = golden[f"greedy_{turn}_ids_with_leading_bos"][1:]
        assert kept.ids == prompt.ids + expected[:-1]
        session._remember(message, "The person seems to be sad.")
    assert session.history == [
        Turn(f"<Img><ImageHere></Img> {questions[0]}", "The person seems to be sad."),
        Turn(questions[1], "The person seems to be sad."),
    ]


def test_an_error_while_the_answer_is_spelt_reaches_the_reader(
    model: GenerationMixin, prompts: list[Encoded], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ids: Any) -> str:
        raise IndexError("no such piece")

    monkeypatch.setattr(model.encoder.tokenizer, "decode", fail)
    with pytest.raises(IndexError, match="no such piece"):  # it hung: nobody told the reader that nothing comes
        list(model.generate_stream(prompts[0], images[:1], GenerateOptions(max_new_tokens=3)))
