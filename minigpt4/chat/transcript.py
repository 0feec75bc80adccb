"""What the terminal chat keeps beside the conversation: its pictures, boxes drawn on them, and a copy as Markdown."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from minigpt4.chat.terminal_image import render
from minigpt4.common.errors import DataError
from minigpt4.common.files import write_atomically, writing
from minigpt4.conversation.grounding import read_grounded
from minigpt4.processors.box_drawing import save_boxes

_MARKS = re.compile(r"([\\`*_\[\]<>#|~!])")


@dataclass(frozen=True)
class Entry:
    """One question and answer, the pictures that came with the question, and the one with the answer's boxes."""

    question: str
    answer: str
    pictures: tuple[Path, ...] = ()
    boxes: Path | None = None


class Transcript:
    """protocol: how pictures appear in the terminal; boxes_folder: where pictures with boxes are written."""

    def __init__(self, protocol: str = "none", boxes_folder: Path = Path("output/chat")) -> None:
        self.protocol, self.boxes_folder = protocol, boxes_folder
        self.entries: list[Entry] = []
        self.pictures: list[tuple[Path, Image.Image]] = []
        self._num_new = 0

    def reset(self) -> None:
        """A new conversation without a picture."""
        self.entries, self.pictures, self._num_new = [], [], 0

    def add_picture(self, path: str | Path, image: Image.Image) -> None:
        """A picture that the next question shows."""
        self.pictures.append((Path(path).expanduser(), image))
        self._num_new += 1
        self.show(image)

    def add_answer(self, question: str, answer: str) -> Path | None:
        """Remember a turn; returns the file with the boxes of the answer on the newest picture, where it has any.

        Raises OutputError when that file cannot be written; the turn is remembered all the same.
        """
        new = tuple(path for path, _ in self.pictures[len(self.pictures) - self._num_new :])
        self._num_new = 0
        self.entries.append(Entry(question, answer, new))
        entities = read_grounded(answer).entities
        if not entities or not self.pictures:
            return None
        source, image = self.pictures[-1]
        with writing(self.boxes_folder):
            self.boxes_folder.mkdir(parents=True, exist_ok=True)
        path = _unused(self.boxes_folder, f"{source.stem}_boxes")
        save_boxes(image, entities, path)
        self.entries[-1] = Entry(question, answer, new, path)
        if self.protocol != "none":
            with Image.open(path) as drawn:
                self.show(drawn)
        return path

    def show_all(self) -> None:
        """Print the pictures of the conversation, and in a terminal without pictures what they are."""
        if not self.pictures:
            print("There is no picture yet: /image PATH")
        for path, image in self.pictures:
            if self.protocol == "none":
                print(f"{path}: {image.width} x {image.height} pixels (this terminal shows none: --show-images always)")
            self.show(image)

    def show(self, image: Image.Image) -> None:
        """Print a picture, where the terminal can."""
        columns = min(60, shutil.get_terminal_size().columns - 1)
        colours = os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit")
        if text := render(image, self.protocol, columns, colours):
            print(text, flush=True)

    def save(self, path: str | Path) -> Path:
        """Write the conversation as Markdown, whole or not at all. Raises DataError and OutputError."""
        file = Path(path).expanduser()
        if not self.entries:
            raise DataError("nothing was said yet, so there is nothing to save")
        if file.is_dir() or not file.parent.is_dir():
            raise DataError(f"'{path}': name a file in a folder that exists")
        write_atomically(file, self._markdown(file.parent))
        return file

    def _markdown(self, folder: Path) -> str:
        lines = ["# Chat", ""]
        for entry in self.entries:
            for picture in entry.pictures:
                lines += [f"![{_escaped(picture.name)}]({_link(picture, folder)})", ""]
            lines += [f"**User:** {_escaped(entry.question)}", "", f"**MiniGPT-4:** {_escaped(entry.answer)}", ""]
            if entry.boxes is not None:
                lines += [f"![boxes]({_link(entry.boxes, folder)})", ""]
        return "\n".join(lines)


def _unused(folder: Path, stem: str) -> Path:
    """The first of ``<stem>_1.png``, ``<stem>_2.png``, ... that does not exist yet."""
    number = 1
    while (path := folder / f"{stem}_{number}.png").exists():
        number += 1
    return path


def _link(path: Path, folder: Path) -> str:
    """A relative link, as it stays right when both are moved together."""
    return quote(os.path.relpath(path.resolve(), folder.resolve()).replace(os.sep, "/"))


def _escaped(text: str) -> str:
    return _MARKS.sub(r"\\\1", text).replace("\n", "  \n")
