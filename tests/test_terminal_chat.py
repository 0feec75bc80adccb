"""The terminal chat: pictures in the terminal, boxes in files, conversations as Markdown."""

from __future__ import annotations

import base64
import builtins
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.chat import command_line
from minigpt4.chat.session import ChatSession
from minigpt4.chat.terminal_image import choose_protocol, render
from minigpt4.chat.transcript import Transcript
from minigpt4.common.errors import DataError
from minigpt4.models.generation import GenerateOptions
from tests.web_parts import scripted_assistant

BOXES = "<p>a face</p> {<10><20><60><80>}"


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),  # tmux swallows the protocol
        ({"TERM": "xterm-kitty", "TMUX": "/run/tmux"}, "none"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "none"),
        ({"TERM": "dumb"}, "none"),
        ({}, "none"),
    ],
)
def test_the_environment_says_how_pictures_are_shown(environment: dict[str, str], protocol: str) -> None:
    assert choose_protocol(environment, is_terminal=True) == protocol
    assert choose_protocol(environment, is_terminal=False) == "none"
    assert choose_protocol(environment, is_terminal=True, wish="never") == "none"
    assert choose_protocol(environment, is_terminal=False, wish="always") != "none"


def test_kitty_gets_the_png_in_chunks() -> None:
    image = Image.effect_noise((200, 200), 80).convert("RGB")
    parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", render(image, "kitty"))
    assert parts[0][0] == "f=100,a=T,q=2,m=1" and {control for control, _ in parts[1:-1]} == {"m=1"}
    assert parts[-1][0] == "m=0" and max(len(content) for _, content in parts) <= 4096
    sent = Image.open(io.BytesIO(base64.b64decode("".join(content for _, content in parts))))
    assert sent.tobytes() == image.tobytes()


def test_iterm_gets_the_png_whole() -> None:
    shown = render(Image.new("RGB", (4, 4), "red"), "iterm")
    assert shown.startswith("\x1b]1337;File=inline=1;size=") and shown.endswith("\x07")
    sent = Image.open(io.BytesIO(base64.b64decode(shown.rsplit(":", 1)[1][:-1])))
    assert sent.getpixel((0, 0)) == (255, 0, 0)


def drawn_from_sixel(text: str, size: tuple[int, int]) -> Image.Image:
    """A reader of the format, written apart from its writer."""
    image, palette, colour, x, top = Image.new("RGB", size), {}, 0, 0, 0
    body = text.removeprefix("\x1bP").removesuffix("\x1b\\").split("q", 1)[1]
    pattern = r'"[\d;]*|#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$])|(-)'
    for found in re.finditer(pattern, body):
        if found[1]:
            palette[int(found[1])] = tuple(round(int(found[i]) * 2.55) for i in (2, 3, 4))
        elif found[5]:
            colour = int(found[5])
        elif found[7] or found[8]:
            for _ in range(int(found[6] or 1)):
                bits = ord(found[7] or found[8]) - 63
                for bit in range(6):
                    if bits >> bit & 1:
                        image.putpixel((x, top + bit), palette[colour])
                x += 1
        elif found[9]:
            x = 0
        elif found[10]:
            x, top = 0, top + 6
    return image


def test_sixel_shows_the_picture() -> None:
    image = Image.new("RGB", (21, 14), "blue")
    image.paste((255, 0, 0), (3, 2, 18, 9))
    assert drawn_from_sixel(render(image, "sixel"), image.size).tobytes() == image.tobytes()


def test_half_blocks_hold_two_pixels_each() -> None:
    image = Image.new("RGB", (2, 2), "black")
    image.paste((255, 0, 0), (0, 0, 2, 1))
    assert render(image, "blocks", columns=2) == "\x1b[38;2;255;0;0;48;2;0;0;0m▀" * 2 + "\x1b[0m"
    assert "38;5;196;48;5;16m" in render(image, "blocks", columns=2, is_true_colour=False)


def test_a_tall_picture_keeps_within_the_screen() -> None:
    assert len(render(Image.new("RGB", (10, 1000)), "blocks").split("\n")) <= 30


def typed(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    feed: Iterator[str] = iter([*lines, "/quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt="": next(feed))


def test_boxes_are_saved_shown_and_linked_in_the_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "my face.png"
    Image.new("RGB", (64, 64), "gray").save(picture)
    assistant, _ = scripted_assistant(BOXES, "It is *grey*.")
    saved = tmp_path / "chat.md"
    typed([f"/image {picture}", "[detection] face", "why?", "/show", f"/save {saved}"], monkeypatch)
    transcript = Transcript("blocks", tmp_path / "drawn")
    assert command_line.interact(ChatSession(assistant), GenerateOptions(), transcript) == 0
    drawn = tmp_path / "drawn" / "my face_boxes_1.png"
    shown = capsys.readouterr().out
    assert f"boxes: {drawn}" in shown and Image.open(drawn).size == (512, 512)
    assert len(re.findall("▀+", re.sub("\x1b[^m]*m", "", shown).replace("\n", " "))) >= 3 * 20  # three pictures
    assert saved.read_text().split("\n\n") == [
        "# Chat",
        "![my face.png](my%20face.png)",
        r"**User:** \[detection\] face",
        r"**MiniGPT-4:** \<p\>a face\</p\> {\<10\>\<20\>\<60\>\<80\>}",
        "![boxes](drawn/my%20face_boxes_1.png)",
        "**User:** why?",
        r"**MiniGPT-4:** It is \*grey\*." + "\n",
    ]


def test_earlier_drawings_are_not_overwritten(tmp_path: Path) -> None:
    transcript = Transcript("none", tmp_path)
    transcript.add_picture("face.png", Image.new("RGB", (32, 32)))
    assert [transcript.add_answer("q", BOXES) for _ in range(2)] == [
        tmp_path / "face_boxes_1.png",
        tmp_path / "face_boxes_2.png",
    ]
    assert transcript.add_answer("q", "no box") is None


def test_nothing_said_or_a_wrong_folder_is_no_file(tmp_path: Path) -> None:
    transcript = Transcript()
    with pytest.raises(DataError, match="nothing was said"):
        transcript.save(tmp_path / "chat.md")
    transcript.add_answer("q", "a")
    with pytest.raises(DataError, match="folder that exists"):
        transcript.save(tmp_path / "nowhere" / "chat.md")
