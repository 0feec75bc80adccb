"""Chat: what is sent to the model, what stays in the conversation, and what a bad picture says."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from minigpt4 import catalog
from minigpt4.chat import command_line
from minigpt4.chat.loading import Assistant, load_assistant, template_name
from minigpt4.chat.session import ChatSession, open_image
from minigpt4.cli import main as minigpt4_main
from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.config import dump_config
from minigpt4.common.errors import CheckpointError, ConfigError, DataError
from minigpt4.common.schema import Config, RunConfig
from minigpt4.common.types import IMAGE_TOKEN, Turn
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.weights import read_weights
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


def test_a_checkpoint_alone_gives_the_trained_model_back(checkpoint: Path) -> None:
    model = load_assistant(str(checkpoint), merge_lora=False).model
    trained = build_model(load_case("c_minigptv2_lora_instruction")).trainable_state()
    loaded = model.trainable_state()
    assert trained.keys() == loaded.keys()
    assert all((trained[name] == loaded[name]).all() for name in trained)
    assert not model.training


def test_an_assistant_answers_without_separate_adapters_and_leaves_the_file_alone(
    assistant: Assistant, checkpoint: Path
) -> None:
    assert not [name for name, _ in assistant.model.named_modules() if "lora" in name]
    assert any("lora" in name for name in read_weights(checkpoint).tensors)


def test_the_chat_sends_the_training_ids(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    turn, prompt = session._fitting_prompt("Is he HAPPY?", SHORT)
    assert turn == "<Img><ImageHere></Img> is he happy? "
    encoder = assistant.model.encoder
    trained = encoder.encode_turns([Turn(turn, "yes")])
    assert trained.ids[: len(prompt.ids)] == prompt.ids
    assert prompt.ids.count(IMAGE_TOKEN) == encoder.num_image_tokens


def test_the_second_question_remembers_the_first_and_its_end_symbol(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    first = session.ask("what is this?", SHORT)
    _, prompt = session._fitting_prompt("sure?", SHORT)
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
    assert session.history == [] and session._fitting_prompt("and this?", SHORT)[1].num_images == 1


def test_an_added_picture_is_shown_with_the_next_question(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    session.add_image(Image.new("RGB", (30, 20), "red"))
    session.ask("who are they?", SHORT)
    session.add_image(Image.new("RGB", (30, 20), "blue"))
    turn, prompt = session._fitting_prompt("and this?", SHORT)
    assert session.history[0].prompt == "<Img><ImageHere></Img> <Img><ImageHere></Img> who are they? "
    assert turn == "<Img><ImageHere></Img> and this? "
    assert prompt.num_images == len(session._features) == 3
    assert session.ask("and this?", SHORT)


def test_leaving_a_stream_early_stops_the_generation_and_keeps_what_was_said(
    assistant: Assistant, picture: Path
) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    pieces = session.stream("what is this?", GenerateOptions(max_new_tokens=300))
    first = next(pieces)
    pieces.close()  # joins the thread; 300 tokens would not be done by then
    assert session.history == [Turn("<Img><ImageHere></Img> what is this? ", first)]
    assert session.ask("go on", SHORT) == unbroken(session, assistant, picture)


def unbroken(session: ChatSession, assistant: Assistant, picture: Path) -> str:
    """The last answer of ``session``, asked by a session that knows the history but has computed nothing yet."""
    fresh = ChatSession(assistant)
    fresh.set_image(open_image(picture))
    fresh.history, fresh._num_new_images = session.history[:-1], 0
    return fresh.ask("go on", SHORT)


def test_beams_answer_in_one_piece(assistant: Assistant, picture: Path) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    pieces = list(session.stream("what is this?", GenerateOptions(max_new_tokens=6, num_beams=3)))
    assert pieces == [session.history[0].answer]


def test_a_question_cannot_fake_a_picture(assistant: Assistant) -> None:
    with pytest.raises(DataError, match="'<ImageHere>', which stands for a picture"):
        ChatSession(assistant).ask("what is <ImageHere>?", SHORT)


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
        f"/add {picture}",
        "and <ImageHere>?",
        "/image",
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
    assert "error: a question must not hold '<ImageHere>'" in shown
    assert shown.count("/image PATH") == 2  # a picture without a path, an unknown command
    assert [turn.prompt for turn in session.history] == ["hello "]


@pytest.mark.parametrize("lines", [["quit"], ["QUIT"], ["/quit"], []])
def test_quit_and_the_end_of_input_leave(
    assistant: Assistant, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(lines, monkeypatch)
    assert command_line.interact(ChatSession(assistant), SHORT) == 0


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs: Iterator[type[BaseException]] = iter([KeyboardInterrupt, EOFError])

    def read(prompt: str = "") -> str:
        raise next(inputs)

    monkeypatch.setattr(builtins, "input", read)
    assert command_line.interact(ChatSession(assistant), SHORT) == 0
    assert "/quit or Ctrl-D leaves." in capsys.readouterr().out


def test_ctrl_c_while_a_picture_is_read_keeps_the_conversation(
    assistant: Assistant, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(assistant)
    session.ask("hello", SHORT)

    def interrupted(image: Image.Image) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_encode", interrupted)
    typed([f"/image {picture}", "quit"], monkeypatch)
    assert command_line.interact(session, SHORT) == 0
    assert "[stopped]" in capsys.readouterr().out and len(session.history) == 1


def test_ctrl_c_stops_an_answer_and_keeps_what_was_printed(
    assistant: Assistant, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    printed: list[str] = []

    def print_twice(*values: str, **kwargs: object) -> None:
        printed.append(values[0] if values else "")
        if len(printed) == 3:  # the label, one piece, and Ctrl-C while the second is printed
            raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "print", print_twice, raising=False)
    command_line._answer(session, "what is this?", GenerateOptions(max_new_tokens=300))
    assert printed[3] == " [stopped]"
    assert session.history[0].answer == "".join(printed[1:3])


def test_two_questions_in_one_call_are_one_conversation(
    checkpoint: Path, assistant: Assistant, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt", str(checkpoint.parent.parent), "--image", str(picture), "--max-new-tokens", "6"]
    assert minigpt4_main(["chat", *flags, "--ask", "what is this?", "--ask", "sure?"]) == 0
    session = ChatSession(assistant)
    session.set_image(open_image(picture))
    expected = [session.ask(question, SHORT) for question in ("what is this?", "sure?")]
    assert capsys.readouterr().out == "\n".join(expected) + "\n"
    alone = ChatSession(assistant)
    alone.set_image(open_image(picture))
    assert alone.ask("sure?", SHORT) != expected[1]


def test_the_legacy_history_is_the_published_chat_s_text(checkpoint: Path, picture: Path) -> None:
    legacy = load_assistant(str(checkpoint), options=["model.chat_format=minigpt_v2_legacy"])
    session = ChatSession(legacy)
    session.set_image(open_image(picture))
    session.history, session._num_new_images = [Turn("<Img><ImageHere></Img> q1", "a1")], 0
    prompt = session._fitting_prompt("q2", SHORT)[1]
    encoder = legacy.model.encoder
    assert prompt.ids == encoder.encode_text("<s>[INST] <Img><ImageHere></Img> q1 [/INST]a1<s>[INST] q2 [/INST]").ids
    assert prompt.ids[:2] == [1, 1] and 2 not in prompt.ids


def test_the_legacy_history_is_refused_for_another_model() -> None:
    catalog.load()
    with pytest.raises(ConfigError, match=r"is for model_type pretrain \(MiniGPT-v2\), not pretrain_vicuna0"):
        template_name("pretrain_vicuna0", "minigpt_v2_legacy")


def test_the_legacy_flag_reaches_the_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt", str(checkpoint), "--max-new-tokens", "6", "--ask", "what?", "--ask", "sure?"]
    answers = []
    for more in ([], ["--legacy-history"]):
        assert minigpt4_main(["chat", *flags, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("model_type", "chat_format", "expected"),
    [
        ("pretrain_vicuna0", "auto", "vicuna_v0"),
        ("pretrain_llama2", "auto", "llama2"),
        ("pretrain", "auto", "minigpt_v2"),
        ("of_my_own", "auto", "training"),
        ("pretrain_vicuna0", "training", "training"),
        ("pretrain", "minigpt_v2_legacy", "minigpt_v2_legacy"),
    ],
)
def test_the_template_follows_the_model_type_unless_the_config_names_one(
    model_type: str, chat_format: str, expected: str
) -> None:
    assert template_name(model_type, chat_format) == expected


@pytest.mark.parametrize(("end_sym", "num_ids", "is_text"), [("</s>", 0, False), ("###", 0, True), ("the", 1, True)])
def test_answers_stop_at_the_end_symbol_by_its_text_and_by_its_id_where_it_is_one(
    end_sym: str, num_ids: int, is_text: bool, assistant: Assistant
) -> None:
    model = build_model(load_case("c_minigptv2_lora_instruction"), end_sym=end_sym)
    options = replace(assistant, model=model).stopping(SHORT)
    assert len(options.stop_ids) == num_ids and options.stop == ((end_sym,) if is_text else ())


def test_an_unknown_chat_format_names_the_nearest() -> None:
    catalog.load()
    with pytest.raises(ConfigError, match="unknown template 'vicuna_v1'.*vicuna_v0"):
        template_name("pretrain", "vicuna_v1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be > 0, got -1.0"),
        (["--top-p", "0"], "top_p must be > 0 and <= 1, got 0.0"),
        (["--num-beams", "0"], "num_beams must be >= 1, got 0"),
        (["--min-new-tokens", "400"], "min_new_tokens 400 is more than max_new_tokens 300"),
        (["--max-length", "200"], "max_length 200 leaves no room for a question before 300 new tokens"),
    ],
)
def test_wrong_decoding_flags_are_told_before_weights_load(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert minigpt4_main(["chat", "--ckpt", "nowhere", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", ["demo_v1_command_line", "demo_v2_command_line"])
def test_the_demo_programs_keep_the_published_flags(program: str) -> None:
    flags = ["--cfg-path", "a.yaml", "--gpu-id", "1", "--image", "b.png", "--options", "model.lora_r=8", "run.seed=1"]
    given = command_line.parse(flags, f"{program}.py")
    assert (given.cfg_path, given.gpu_id, given.image, given.options) == (
        "a.yaml",
        1,
        "b.png",
        ["model.lora_r=8", "run.seed=1"],
    )


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


def test_a_picture_with_a_broken_chunk_is_named(tmp_path: Path, picture: Path) -> None:
    content = bytearray(picture.read_bytes())
    content[37:41] = b"\0\0\0\0"  # the name of the chunk behind the header
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match="not readable as a picture"):
        open_image(tmp_path / "broken.png")


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
