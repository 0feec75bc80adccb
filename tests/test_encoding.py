"""What turns become: what is supervised, what is cut, and that chat equals training."""

from __future__ import annotations

from itertools import pairwise

import pytest

from minigpt4.common.errors import DataError
from minigpt4.common.types import IGNORE_INDEX, IMAGE_TAG, IMAGE_TOKEN, Turn
from minigpt4.conversation.encoding import Encoder
from minigpt4.conversation.tokenizer import load_tokenizer
from tests.golden_cases import GOLDEN

TOKENIZER = load_tokenizer(str(GOLDEN / "tokenizer" / "tok"))
IMG = "<Img><ImageHere></Img>"


def make(**changes: object) -> Encoder:
    options: dict[str, object] = {"num_image_tokens": 4, "prompt_template": "[INST] {} [/INST]", "wrap": True}
    return Encoder(TOKENIZER, **{**options, "end_sym": "</s>", **changes})  # type: ignore[arg-type]


def supervised_text(encoder: Encoder, turns: list[Turn]) -> str:
    encoded = encoder.encode_turns(turns)
    ids = [i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label != IGNORE_INDEX]
    assert ids == [label for label in encoded.labels if label != IGNORE_INDEX]
    return "|".join(TOKENIZER.decode(ids[a:b]) for a, b in _pieces(ids))


def _pieces(ids: list[int]) -> list[tuple[int, int]]:
    ends = [i + 1 for i, value in enumerate(ids) if value == TOKENIZER.eos_id]
    return list(pairwise([0, *ends]))


def test_the_training_text_has_two_spaces_before_the_closing_mark() -> None:
    encoded = make().encode_turns([Turn(f"{IMG} [vqa] is the sky dark? ", "yes")])
    expected = [1, *TOKENIZER.encode("[INST] <Img>"), *[IMAGE_TOKEN] * 4]
    expected += TOKENIZER.encode("</Img> [vqa] is the sky dark?  [/INST]") + TOKENIZER.encode("yes</s>")
    assert encoded.ids == expected


def test_every_answer_of_a_conversation_is_supervised_and_no_question() -> None:
    turns = [Turn(f"{IMG} [refer] the left cup ", "{<12><40><30><66>}"), Turn("[vqa] what colour is it? ", "blue")]
    assert supervised_text(make(), turns) == "{<12><40><30><66>}|blue"


def test_later_turns_start_with_bos() -> None:
    encoded = make().encode_turns([Turn(f"{IMG} a ", "b"), Turn("c ", "d")])
    assert encoded.ids.count(TOKENIZER.bos_id or 0) == 2


def test_a_bare_image_is_never_wrapped() -> None:
    encoded = make().encode_turns([Turn(IMAGE_TAG, "a red bus")])
    assert encoded.ids[:5] == [1, *[IMAGE_TOKEN] * 4]
    assert encoded.ids[5:] == TOKENIZER.encode("a red bus</s>")


def test_without_chat_template_a_single_instruction_stays_as_it_is() -> None:
    encoded = make(wrap=False).encode_turns([Turn("say hi", "hi")])
    assert encoded.ids == [1, *TOKENIZER.encode("say hi"), *TOKENIZER.encode("hi</s>")]


def test_a_chat_prompt_equals_the_training_ids_of_the_same_turns() -> None:
    encoder = make()
    turns = [Turn(f"{IMG} who? ", "a man"), Turn("sure? ", "yes")]
    trained = encoder.encode_turns([*turns, Turn("why? ", "because")]).ids
    asked = encoder.encode_prompt(turns, "why? ")
    assert trained[: len(asked.ids)] == asked.ids
    assert asked.num_images == 1


def test_a_cut_answer_loses_its_end_symbol_and_says_so() -> None:
    encoded = make(max_txt_len=3).encode_turns([Turn(f"{IMG} q ", "a very long answer about a face")])
    assert encoded.is_truncated and encoded.ids[-1] != TOKENIZER.eos_id
    assert sum(label != IGNORE_INDEX for label in encoded.labels) == 3


def test_a_cut_never_splits_an_image() -> None:
    encoder = make(max_txt_len=12)
    turns = [Turn(f"{IMG} q ", "a"), Turn(f"{IMG} and this one? ", "b")]
    encoded = encoder.encode_turns(turns)
    assert encoded.ids.count(IMAGE_TOKEN) % 4 == 0
    assert encoded.num_images == encoded.ids.count(IMAGE_TOKEN) // 4


def test_text_only_prompts_are_never_cut() -> None:
    encoded = make(max_context_len=3).encode_turns([Turn("a rather long instruction without image", "ok")])
    assert len(encoded.ids) > 10


def test_a_context_too_short_for_its_image_is_an_error() -> None:
    with pytest.raises(DataError, match="max_context_len 8 leaves no room for an image of 4 positions"):
        make(max_context_len=8).encode_turns([Turn(f"{IMG} q ", "a")])


def test_two_images_in_one_prompt_have_their_own_positions() -> None:
    encoded = make().encode_turns([Turn(f"{IMG} and {IMG} same person? ", "no")])
    assert encoded.num_images == 2 and encoded.ids.count(IMAGE_TOKEN) == 8
