"""The web demos without a browser: limits, the line, conversations of several tabs, stops."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.chat.session import ChatSession
from minigpt4.cli import report_errors
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.conversation.grounding import read_grounded
from minigpt4.models.generation import GenerateOptions
from minigpt4.web.answer import Answer
from minigpt4.web.command_line import V1, V2, Demo, build_parser, fitting, free_port, main
from minigpt4.web.limits import Limits
from minigpt4.web.line import Line
from minigpt4.web.markup import coloured, plain
from minigpt4.web.tasks import TASKS, has_task_tag, with_box
from minigpt4.web.visits import Message, Visits
from tests.web_parts import scripted_assistant, tiny_assistant

SHORT = GenerateOptions(max_new_tokens=6)
BOXES = "<p>a face</p> {<10><20><60><80>} and <p>eyes</p> {<20><30><50><40>}"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "face.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.png"
    Image.new("RGB", (90, 40), "red").save(path)
    return path


def last(messages: Iterator[list[Message]]) -> list[Message]:
    *_, shown = messages
    return shown


def texts(messages: list[Message]) -> list[str]:
    return [message.text for message in messages if message.picture is None]


# limits


def test_a_picture_is_upright_and_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert Limits().open_upload(tmp_path / "turned.jpg").size == (20, 40)
    assert Limits().open_upload(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("limits", "content", "message"),
    [
        (Limits(), b"not a picture", "'face.png' is not a picture that can be read"),
        (Limits(), None, "'face.png' is damaged"),
        (Limits(max_megapixels=1), Image.new("L", (1200, 900)), "1,200 x 900 pixels; at most 1 megapixels"),
        (Limits(max_megabytes=1), bytes(2_000_000), "2.0 MB; at most 1 MB"),
    ],
)
def test_a_bad_upload_says_what_is_wrong(
    limits: Limits, content: bytes | Image.Image | None, message: str, picture: Path
) -> None:
    if isinstance(content, Image.Image):
        content.save(picture)
    else:
        picture.write_bytes(picture.read_bytes()[:500] if content is None else content)
    with pytest.raises(DataError, match=message) as told:
        limits.open_upload(picture)
    assert str(picture.parent) not in str(told.value)  # the server's folders are nobody's business


@pytest.mark.parametrize(
    ("question", "message"), [("  \n", "Write a question first"), ("x" * 4001, "4,001 characters")]
)
def test_an_empty_or_endless_question_is_refused(question: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Limits().check_question(question)


def test_a_limit_below_one_is_told_before_weights_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: main(["--ckpt", "nowhere", "--max-megabytes", "0"], V2)) == 2
    assert "--max-megabytes must be >= 1, got 0" in capsys.readouterr().err


# the box of [identify]


def test_identify_takes_the_drawn_box_and_nothing_else_does() -> None:
    assert with_box("[identify] what is this ", "{<1><2><30><40>}") == "[identify] what is this {<1><2><30><40>}"
    assert with_box("[identify] {<5><5><9><9>}", "{<1><2><30><40>}") == "[identify] {<5><5><9><9>}"
    assert with_box("what is this", "{<1><2><30><40>}") == "what is this"


@pytest.mark.parametrize(
    ("box", "message"), [("", "Drag a box"), ("10 20 30 40", "is not a box"), ("{<9><9><3><3>}", "covers nothing")]
)
def test_identify_without_a_box_asks_for_one(box: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_box("[identify] what is this ", box)


def test_every_button_but_chat_writes_a_tag_of_a_task() -> None:
    assert [task.label for task in TASKS if not has_task_tag(task.text)] == ["Chat"]


# what is shown


def test_text_of_people_and_models_is_never_html_or_markdown() -> None:
    shown = plain("<img src=x> **a** [b](http://c) `d`\n$e$ & more")
    assert not set("<*[]`$") & set(shown.replace("<br>", "")) and "&lt;img" in shown and "&amp; more" in shown


def test_a_phrase_stands_on_the_colour_of_its_box() -> None:
    shown = coloured(read_grounded("I see <p><b>one</b></p> {<1><2><3><4>}."))
    assert shown.startswith("I see <span style=") and "&lt;b&gt;one" in shown and "{" not in shown


# the line


def test_the_line_is_first_come_first_served_and_has_an_end() -> None:
    line = Line(max_waiting=1)
    with line.place() as first:
        assert first.wait(0)
        with line.place() as second:
            assert second.ahead == 1 and not second.wait(0.01)
            with pytest.raises(DataError, match="1 questions are waiting already"), line.place():
                pass
    with line.place() as third:
        assert third.wait(0)


# conversations


def test_two_tabs_do_not_share_pictures_or_words(tmp_path: Path, picture: Path, other: Path) -> None:
    visits = Visits(tiny_assistant(), tmp_path / "files", Limits())
    paths = {"a": picture, "b": other}
    for key, path in paths.items():
        visits.receive(key, path)
    for question in ("what is this?", "sure?"):  # interleaved
        for key in paths:
            last(visits.ask(key, question, "", SHORT))
    for key, path in paths.items():
        alone = ChatSession(tiny_assistant())
        alone.set_image(Limits().open_upload(path))
        expected = [alone.ask(question, SHORT) for question in ("what is this?", "sure?")]
        assert texts(visits.visit(key).messages)[1::2] == expected
        assert visits.visit(key).session.history == alone.history


def test_the_model_reads_its_own_answers_again(tmp_path: Path, picture: Path) -> None:
    assistant, model = scripted_assistant(BOXES, "yes")
    visits = Visits(assistant, tmp_path / "files", Limits())
    visits.receive("a", picture)
    last(visits.ask("a", "[grounding] describe this image in detail", "", SHORT))
    last(visits.ask("a", "sure?", "", SHORT))
    assert f"{BOXES}</s>" in model.asked[1]


def test_boxes_of_answers_and_of_questions_are_drawn(tmp_path: Path, picture: Path) -> None:
    assistant, model = scripted_assistant(BOXES, "an eye")
    visits = Visits(assistant, tmp_path / "files", Limits())
    visits.receive("a", picture)
    shown = last(visits.ask("a", "what?", "", SHORT))
    assert [message.role for message in shown if message.picture and message.picture.is_file()] == ["assistant"]
    shown = last(visits.ask("a", "[identify] what is this ", "{<20><30><50><40>}", SHORT))[3:]
    assert [(message.role, message.picture is None) for message in shown] == [
        ("user", True),
        ("user", False),
        ("assistant", True),
    ]
    assert "what is this {<20><30><50><40>}" in model.asked[1]


def test_a_question_about_a_picture_needs_one(tmp_path: Path) -> None:
    visits = Visits(tiny_assistant(), tmp_path, Limits())
    with pytest.raises(DataError, match="Upload a picture first"):
        next(visits.ask("a", "[refer] the mouth", "", SHORT))
    assert visits.visit("a").messages == []
    with pytest.raises(DataError, match="Upload a picture first"):
        next(Visits(tiny_assistant(), tmp_path, Limits(), needs_picture=True).ask("a", "hello", "", SHORT))


def test_a_question_that_fails_leaves_the_conversation_as_it_was(tmp_path: Path, picture: Path) -> None:
    visits = Visits(tiny_assistant(), tmp_path, Limits())
    visits.receive("a", picture)
    with pytest.raises(DataError, match="stands for a picture"):
        last(visits.ask("a", "what is <ImageHere>?", "", SHORT))
    assert visits.visit("a").messages == [] and visits.visit("a").session.history == []


def test_a_bad_picture_ends_the_conversation_of_before(tmp_path: Path, picture: Path) -> None:
    visits = Visits(tiny_assistant(), tmp_path, Limits())
    visits.receive("a", picture)
    picture.write_bytes(b"nothing")
    with pytest.raises(DataError, match="is not a picture"):
        visits.receive("a", picture)
    assert visits.visit("a").preview is None


# stops


def test_stop_ends_the_answer_and_keeps_what_was_said(tmp_path: Path) -> None:
    assistant, model = scripted_assistant("word " * 500, seconds=0.01)
    visits = Visits(assistant, tmp_path, Limits())
    shown = visits.ask("a", "talk", "", SHORT)
    next(shown), next(shown), next(shown)
    visits.stop("a")
    messages = last(shown)
    assert messages[-1] == Message("note", "Stopped.") and model.num_words < 400
    assert visits.visit("a").session.history[0].answer == messages[1].text.strip()


def test_restart_ends_the_answer_and_forgets_everything(tmp_path: Path, picture: Path) -> None:
    assistant, model = scripted_assistant("word " * 500, seconds=0.01)
    visits = Visits(assistant, tmp_path, Limits())
    visits.receive("a", picture)
    shown = visits.ask("a", "talk", "", SHORT)
    next(shown), next(shown)
    answer = visits.visit("a").answer
    visits.restart("a")
    assert list(shown) == []  # nothing of it comes into the new conversation
    assert answer is not None and answer.is_done and model.num_words < 400
    visit = visits.visit("a")
    assert visit.messages == [] and visit.session.history == [] and visit.preview is None
    assert visits._kept == []


def test_a_closed_tab_ends_its_answer_and_lets_the_next_one_in(tmp_path: Path) -> None:
    assistant, _ = scripted_assistant("word " * 500, "hello", seconds=0.01)
    visits = Visits(assistant, tmp_path, Limits())
    next(visits.ask("a", "talk", "", SHORT))
    while not visits.line._places:  # its thread is on its way
        time.sleep(0.01)
    waiting = visits.ask("b", "hi", "", SHORT)
    next(waiting)
    assert next(waiting)[-1].text.startswith("Waiting: 1 question is answered first")
    visits.leave("a")
    assert last(waiting)[-1].text == "hello"


def test_an_answer_that_nobody_looks_at_ends_by_itself() -> None:
    def pieces(ended: threading.Event) -> Iterator[str]:
        while not ended.is_set():
            yield "word "

    answer = Answer(pieces, Line(1), patience=0.1)
    answer.join(10)
    assert answer.is_done and answer.is_stopped


def test_a_second_question_of_one_tab_waits_for_the_first(tmp_path: Path) -> None:
    assistant, _ = scripted_assistant("word " * 500, seconds=0.01)
    visits = Visits(assistant, tmp_path, Limits())
    next(visits.ask("a", "talk", "", SHORT))
    with pytest.raises(DataError, match="still on its way"):
        next(visits.ask("a", "and?", "", SHORT))
    visits.leave("a")


def test_beams_stop_too() -> None:
    session, stopped = ChatSession(tiny_assistant()), threading.Event()
    stopped.set()
    options = GenerateOptions(max_new_tokens=200, num_beams=3)
    started = time.process_time()
    list(session.stream("what is this?", options, stopped))
    assert len(session.history[0].answer.split()) <= 2 and time.process_time() - started < 5


def test_the_conversations_unused_longest_are_put_away_and_say_so(tmp_path: Path, picture: Path) -> None:
    visits = Visits(tiny_assistant(), tmp_path, Limits(max_visits=2))
    for key in "abc":
        visits.receive(key, picture)
    with pytest.raises(DataError, match="put away. Upload the picture again"):
        next(visits.ask("a", "and?", "", SHORT))
    assert visits.visit("c").preview is not None


def test_computed_positions_are_kept_for_the_newest_conversations_only(tmp_path: Path) -> None:
    visits = Visits(tiny_assistant(), tmp_path, Limits())
    for key in "abcdef":
        last(visits.ask(key, "hello", "", SHORT))
    kept = [key for key in "abcdef" if visits.visit(key).session._cache.ids]
    assert kept == list("cdef")
    before = visits.visit("a").session.history[0]
    last(visits.ask("a", "sure?", "", SHORT))
    assert visits.visit("a").session.history[0] == before


# the programs


@pytest.mark.parametrize(("demo", "words", "temperature"), [(V1, 300, 1.0), (V2, 500, 0.6)])
def test_the_demos_keep_the_published_flags_and_listen_to_this_machine_only(
    demo: Demo, words: int, temperature: float
) -> None:
    given = build_parser(demo).parse_args(
        ["--cfg-path", "a.yaml", "--gpu-id", "1", "--options", "model.lora_r=8", "run.seed=1"]
    )
    assert (given.cfg_path, given.gpu_id, given.options) == ("a.yaml", 1, ["model.lora_r=8", "run.seed=1"])
    assert (given.host, given.share) == ("127.0.0.1", False)
    assert (given.max_new_tokens, given.temperature, given.repetition_penalty) == (words, temperature, 1.05)


@pytest.mark.parametrize("auth", ["me", "me:", ":secret"])
def test_half_a_password_is_refused(auth: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_errors(lambda: main(["--ckpt", "nowhere", "--auth", auth], V2)) == 2
    assert "--auth: expected USER:PASSWORD" in capsys.readouterr().err


def test_an_answer_takes_half_of_a_small_window_at_most() -> None:
    window = tiny_assistant().model.context_window
    assert window is not None
    options = fitting(GenerateOptions(max_new_tokens=500, max_length=2000), tiny_assistant())
    assert options.max_length == min(window, 2000) and options.max_new_tokens == min(500, options.max_length // 2)


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1, port {number}"):
            free_port("127.0.0.1", number)
        assert free_port("127.0.0.1", None) != number
