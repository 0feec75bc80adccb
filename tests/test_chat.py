"""Chat: what is sent to the model, what stays in the conversation, and what a bad picture says."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from minigpt4 import catalog
from minigpt4.chat import command_line
from minigpt4.chat.loading import Assistant, load_assistant
from minigpt4.chat.session import ChatSession, open_image
from minigpt4.cli import main as minigpt4_main
from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.config import dump_config
from minigpt4.common.errors import CheckpointError, ConfigError, DataError
from minigpt4.common.schema import Config, RunConfig
from minigpt4.common.types import IMAGE_TOKEN, Turn
from minigpt4.models.generation import GenerateOptions
from tests.golden_cases import build_model, load_case

SHORT = GenerateOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights-only checkpoint of the tiny MiniGPT-v2, trained (so it says) on questions in lower case."""
    catalog.load()
    model = build_model(load_case("c_minigptv2_lora_instruction"))
    folder = tmp_path_factory.mktemp("job")
    return save_checkpoint(
        folder / "checkpoints",
        3,
        weights=model.trainable_state(),
        config_text=dump_config(Config(model=model.cfg, datasets={}, run=RunConfig())),
        manifest={"question_processor": "blip_caption"},
        resume=None,
        keep_last=1,
    )


@pytest.fixture(scope="module")
def assistant(checkpoint: Path) -> Assistant:
    return load_assistant(str(checkpoint))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "face.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def test_a_checkpoint_alone_gives_the_trained_model_back(assistant: Assistant) -> None:
    trained = build_model(load_case("c_minigptv2_lora_instruction")).trainable_state()
    loaded = assistant.model.trainable_state()
    assert trained.keys() == loaded.keys()
    assert all((trained[name] == loaded[name]).all() for name in trained)
    assert not assistant.model.training


def test_the_chat_sends_the_training_ids(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    turn, prompt = session._prompt("Is he HAPPY?")
    assert turn == "<Img><ImageHere></Img> is he happy? "
    encoder = assistant.model.encoder
    trained = encoder.encode_turns([Turn(turn, "yes")])
    assert trained.ids[: len(prompt.ids)] == prompt.ids
    assert prompt.ids.count(IMAGE_TOKEN) == encoder.num_image_tokens


def test_the_second_question_remembers_the_first_and_its_end_symbol(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    first = session.ask("what is this?", SHORT)
    _, prompt = session._prompt("sure?")
    assert session.history == [Turn("<Img><ImageHere></Img> what is this? ", first)]
    assert prompt.ids.count(assistant.model.encoder.tokenizer.eos_id) >= 1
    assert prompt.num_images == 1
    assert session.ask("sure?", SHORT) and len(session.history) == 2


def test_a_streamed_answer_is_the_answer(assistant: Assistant, picture: Path) -> None:
    whole, streamed = ChatSession(assistant), ChatSession(assistant)
    for session in (whole, streamed):
        session.set_image(open_image(picture))
    assert "".join(streamed.stream("what is this?", SHORT)) == whole.ask("what is this?", SHORT)
    assert streamed.history == whole.history


def test_a_new_picture_starts_a_new_conversation(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    session.ask("what is this?", SHORT)
    session.set_image(open_image(picture))
    assert session.history == [] and session._prompt("and this?")[1].num_images == 1


def test_leaving_a_stream_early_stops_the_generation(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    pieces = session.stream("what is this?", GenerateOptions(max_new_tokens=300))
    next(pieces)
    pieces.close()  # joins the thread; 300 tokens would not be done by then
    assert session.history == []


def typed(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    feed: Iterator[str] = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(feed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def test_the_interactive_chat_knows_its_commands(
    assistant: Assistant, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(assistant)
    lines = [
        f"/image {picture}",
        "",
        "what is this?",
        "/image nowhere.png",
        "/reset",
        "hello",
        "/what",
        "/quit",
        "never",
    ]
    typed(lines, monkeypatch)
    assert command_line.interact(session, SHORT) == 0
    shown = capsys.readouterr().out
    assert shown.count("MiniGPT-4: ") == 2  # the empty line asks nothing, nothing is asked after /quit
    assert "error: image 'nowhere.png': no such file" in shown
    assert "/image PATH" in shown
    assert [turn.prompt for turn in session.history] == ["hello "]


@pytest.mark.parametrize("lines", [["quit"], ["QUIT"], ["/quit"], []])
def test_quit_and_the_end_of_input_leave(
    assistant: Assistant, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(lines, monkeypatch)
    assert command_line.interact(ChatSession(assistant), SHORT) == 0


def test_ask_prints_one_answer_per_question(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt", str(checkpoint.parent.parent), "--image", str(picture), "--max-new-tokens", "4"]
    assert minigpt4_main(["chat", *flags, "--ask", "what is this?", "--ask", "sure?"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2


def test_a_missing_picture_is_told_before_weights_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert minigpt4_main(["chat", "--ckpt", "nowhere", "--image", "nowhere.png"]) == 2
    assert "error: image 'nowhere.png': no such file" in capsys.readouterr().err


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "face.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"face\.png': not readable as a picture"):
        open_image(tmp_path / "face.png")


def test_a_truncated_picture_is_named(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:300])
    with pytest.raises(DataError, match="not readable as a picture"):
        open_image(tmp_path / "half.png")


def test_a_program_for_one_architecture_refuses_another(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="'minigpt_v2', this program talks to: minigpt4"):
        load_assistant(str(checkpoint), archs=("minigpt4",))


def test_an_incomplete_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_assistant(str(copy))


def test_neither_checkpoint_nor_yaml_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        minigpt4_main(["chat"])
    assert left.value.code == 2
    assert "--ckpt and --cfg-path" in capsys.readouterr().err
