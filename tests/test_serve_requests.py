"""What a request may say: fields, messages, pictures, and the ids that are made of it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minigpt4.chat.prompts import encode_conversation
from minigpt4.common.errors import DataError
from minigpt4.conversation.chat_template import read_turn_format
from minigpt4.conversation.encoding import Encoder
from minigpt4.conversation.tokenizer import HuggingFaceTokenizer
from minigpt4.serve.errors import ApiError
from minigpt4.serve.pictures import PictureLimits, read_picture
from minigpt4.serve.prompts import Preparer, shown_parts
from minigpt4.serve.requests import ChatRequest, Defaults, Picture, parse
from tests.serve_parts import VICUNA, asked, data_url, picture, tiny_assistant
from tests.tiny_backbones import FAMILIES, write_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


def parsed(**fields: Any) -> ChatRequest:
    return parse(json.dumps({"messages": HELLO, **fields}).encode(), Defaults())


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        parsed(**fields)
    return error.value


def test_a_request_without_options_is_greedy_and_nothing_else_matters() -> None:
    options = parsed().options
    assert (options.do_sample, options.max_new_tokens, options.seed) == (False, 300, None)
    assert parsed(seed=3, top_p=0.5, temperature=0).options == options  # shares a batch with the first
    sampled = parsed(seed=3, top_p=0.5, temperature=0.7, max_tokens=9, stop="#", top_k=5).options
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 0.7, 0.5, 5)
    assert (sampled.seed, sampled.max_new_tokens, sampled.stop) == (3, 9, ("#",))


def test_harmless_and_neutral_fields_are_passed_over() -> None:
    fields = {"user": "x", "metadata": {}, "store": True, "n": 1, "frequency_penalty": 0, "logprobs": False}
    neutral = {"response_format": {"type": "text"}, "tools": [], "temperature": None, "stream_options": None}
    assert parsed(**fields, **neutral) == parsed()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 2}, "n", "n must be 1, got 2"),
        ({"tools": [{}]}, "tools", "tools is not supported here"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", r"not supported here \(accepted: 0\)"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"temprature": 1}, "temprature", r"unknown parameter 'temprature' \(did you mean 'temperature'\?\)"),
        ({"temperature": 3}, "temperature", "temperature must be a number from 0 to 2, got 3"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"temperature": 1, "top_p": 0}, "top_p", "top_p must be > 0"),
        ({"max_tokens": 0}, "max_tokens", "must be a whole number from 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "max_completion_tokens 4 and max_tokens 3"),
        ({"stop": [1]}, "stop", "stop must be a text or a list"),
        ({"stop": [""]}, "stop", "stop must be a text or a list"),
        ({"stream": 1}, "stream", "stream must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "with stream: true only"),
        ({"model": 3}, "model", "model must be a text"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "allowed: system, user, assistant"),
        ({"messages": HELLO * 2}, "messages[1].role", r"messages\[1\]: role user, expected assistant"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages", "must be a user's"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "must be a user's"),
        ({"messages": [*HELLO, {"role": "system", "content": "x"}]}, "messages[1].role", "expected assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a text or a list of parts"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "neither a text nor a picture"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "half a character"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "got type 'input_audio'",
        ),
        (
            {"messages": [{"role": "system", "content": asked(picture())[0]["content"]}, *HELLO]},
            "messages[0].content",
            "only a user shows pictures",
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (400, param)
    error.args = (error.message,)
    with pytest.raises(ApiError, match=message):
        raise error


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b'{"seed": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_object_is_told_so(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse(body, Defaults())
    assert (error.value.status, error.value.code) == (400, "invalid_json")


def test_pictures_stand_in_front_of_the_text_unless_texts_stand_around_them() -> None:
    one, two = Picture("1"), Picture("2")
    assert shown_parts(["a", one, two]) == shown_parts([one, two, "a"]) == [None, None, "a"]
    assert shown_parts([one, "a", "b"]) == [None, "a\nb"]
    assert shown_parts(["first", one, "second", two, "differ?"]) == ["first", None, "second", None, "differ?"]
    assert shown_parts([" ", one]) == [None]


def test_no_path_leads_out_of_the_image_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    picture().save(tmp_path / "secret.png")
    picture().save(root / "a b.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "own link.png").symlink_to(root / "a b.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    limits = PictureLimits(root.resolve())
    for url in ("a b.png", "file:///" + str(root / "a%20b.png").lstrip("/"), "inner/../a b.png", "own link.png"):
        assert read_picture(url, limits).size == (40, 30)
    outside = ("../secret.png", str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "link.png")
    for url in (*outside, "file:///%2e%2e/secret.png", "nowhere.png", "inner", "loop.png", "a\0b", "x" * 5000):
        with pytest.raises(ApiError, match="no readable file below the server's --image-root") as error:
            read_picture(url, limits)
        assert error.value.status == 400
    with pytest.raises(ApiError, match="a file of another machine"):
        read_picture("file://host/a.png", limits)
    with pytest.raises(ApiError, match="reads no files"):
        read_picture("a b.png", PictureLimits())
    with pytest.raises(ApiError, match="bytes, allowed are 10"):
        read_picture("a b.png", replace(limits, max_bytes=10))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.png", "picture links are not followed"),
        ("HTTP://example.com/a.png", "picture links are not followed"),
        ("data:image/png,abc", "a data URL must be"),
        ("data:image/png;base64,a$b=", "the data is not base64"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "not readable as a picture"),
        (data_url(picture())[:120], "not readable as a picture|not base64"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "not readable as a picture"),
        ("ftp://example.com/a.png", "reads no files"),
    ],
)
def test_other_pictures_are_refused(url: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as error:
        read_picture(url, PictureLimits())
    assert (error.value.status, error.value.code) == (400, "invalid_image_url")


def test_a_system_text_takes_the_place_of_the_published_template_s_own() -> None:
    assistant = tiny_assistant(VICUNA, "vicuna_v0")
    encoder = assistant.model.encoder
    assert encode_conversation(assistant, [], "why?", "Be brief.") == encoder.encode_text(
        "Be brief.###Human: why?###Assistant: "
    )
    assert encode_conversation(assistant, [], "why?").ids != encode_conversation(assistant, [], "why?", "Be brief.").ids
    with pytest.raises(DataError, match="'minigpt_v2_legacy' of this model has no system text"):
        encode_conversation(replace(assistant, template="minigpt_v2_legacy"), [], "why?", "Be brief.")


@pytest.mark.parametrize(
    ("family", "message"), [("qwen2", ""), ("mistral", "takes no such system text"), ("", "without")]
)
def test_a_system_text_goes_where_the_tokenizer_s_template_puts_it(family: str, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, FAMILIES[family or "qwen2"])
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    own = read_turn_format(tokenizer.render, tokenizer.special, "tiny") if family else None
    encoder = Encoder(tokenizer, 4, end_sym=own.end if own else "\n", turn_format=own)
    model: Any = SimpleNamespace(encoder=encoder)
    assistant = replace(tiny_assistant(), model=model, template="training")
    if message:
        with pytest.raises(DataError, match=message):
            encode_conversation(assistant, [], "Why?", "Be brief.")
        return
    written = tokenizer.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], True)
    assert encode_conversation(assistant, [], "Why?", "Be brief.").ids == tokenizer.encode(written)


def test_no_text_can_stand_for_a_picture() -> None:
    preparer = Preparer(tiny_assistant(VICUNA, "vicuna_v0"), PictureLimits())
    tag = {"content": "<ImageHere>"}
    for messages in (
        [{"role": "user", **tag}],
        [*HELLO, {"role": "assistant", **tag}, *HELLO],
        [{"role": "system", **tag}, *HELLO],
    ):
        with pytest.raises(ApiError, match="'<ImageHere>', which stands for a picture"):
            preparer(parsed(messages=messages))


def test_an_answer_may_be_as_long_as_the_window_has_room() -> None:
    assistant = tiny_assistant()
    prepared = Preparer(assistant, PictureLimits())(parsed(max_tokens=1_000_000))
    assert prepared.options.max_new_tokens + len(prepared.prompt.ids) == assistant.model.context_window
