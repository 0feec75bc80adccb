"""One conversation about images: history, images encoded once, positions computed once, answers streamed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.chat.prompts import encode_conversation, turn_text
from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, Encoded, Turn
from minigpt4.conversation.templates import ChatTemplate
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.prompt_cache import PromptCache

log = logging.getLogger(__name__)


def open_image(path: str | Path) -> Image.Image:
    """A decoded picture. Raises DataError that names the file and what is wrong with it."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"image '{path}': no such file")
    try:
        image = Image.open(file)
        image.load()
    # Pillow's readers raise SyntaxError and ValueError for broken chunks.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image '{path}': not readable as a picture ({error})") from error
    return image


class ChatSession:
    """A conversation with one model, written as the model's template says.

    Every picture goes through the vision tower once, and every position through the language model once, as long as a
    turn starts with the ids of the turn before. ``notify`` is told when old turns leave the window.
    """

    def __init__(self, assistant: Assistant, notify: Callable[[str], None] = log.warning) -> None:
        self.assistant = assistant
        self.template: ChatTemplate = registry.get("template", assistant.template)
        self.history: list[Turn] = []
        self._notify = notify
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and its images."""
        self.history = []
        self._features = torch.zeros(0, 3, 1, 1)  # [N, P, C'] once there are images
        self._num_new_images = 0
        self._cache = PromptCache()

    def release(self) -> None:
        """Free the memory of computed positions; the conversation stays, and the next question computes them again."""
        self._cache = PromptCache()

    def set_image(self, image: Image.Image | Tensor) -> None:
        """Start a new conversation about ``image``: a picture, or pixels [3, S, S] of the assistant's processor."""
        features = self._encode(image)
        self.reset()
        self._features, self._num_new_images = features, 1

    def add_image(self, image: Image.Image) -> None:
        """Show one more picture with the next question; the conversation goes on."""
        features = self._encode(image)
        self._features = torch.cat([self._features, features]) if len(self._features) else features
        self._num_new_images += 1

    def ask(self, question: str, options: GenerateOptions) -> str:
        """The answer to ``question``; it joins the history. Raises DataError as ``stream`` does."""
        for _ in self.stream(question, options):
            pass
        return self.history[-1].answer

    def stream(self, question: str, options: GenerateOptions, stopped: threading.Event | None = None) -> Generator[str]:
        """Pieces of the answer as they come. What was read joins the history, also when the reader leaves early.

        Setting ``stopped`` from another thread ends the answer. With several beams the answer is one piece. Turns that
        leave the window are dropped before anything is computed. Raises DataError for a question that cannot be asked.
        """
        turn, prompt = self._fitting_prompt(question, options)
        return self._answer(turn, prompt, self.assistant.stopping(options), stopped or threading.Event())

    @staticmethod
    def first_prompt(assistant: Assistant, question: str) -> Encoded:
        """Ids of the first question about one image, as a conversation would send it."""
        session = ChatSession(assistant)
        return session._encoded([], session._turn_text(question, num_images=1))

    def _answer(self, turn: str, prompt: Encoded, options: GenerateOptions, stopped: threading.Event) -> Generator[str]:
        model = self.assistant.model
        if options.num_beams > 1:
            answer = model.generate([prompt], self._features, options, stopped)[0]
            self._remember(turn, answer)
            yield answer
            return
        read: list[str] = []
        with contextlib.closing(model.generate_stream(prompt, self._features, options, self._cache)) as pieces:
            try:
                while not stopped.is_set():
                    read.append(next(pieces))
                    yield read[-1]
                if read:
                    self._remember(turn, "".join(read))
            except StopIteration as finished:
                self._remember(turn, finished.value)
            except (GeneratorExit, KeyboardInterrupt):
                if read:
                    self._remember(turn, "".join(read))
                raise

    @torch.no_grad()
    def _encode(self, image: Image.Image | Tensor) -> Tensor:
        """A picture, or its pixels [3, S, S] -> features [1, P, C']."""
        model = self.assistant.model
        pixels = self.assistant.image_processor(image) if isinstance(image, Image.Image) else image
        with model.autocast():
            return model.vision_features(pixels[None].to(model.device))

    def _fitting_prompt(self, question: str, options: GenerateOptions) -> tuple[str, Encoded]:
        """The turn and its ids, after dropping the oldest turns that the window has no room for; images stay."""
        turn, history = self._turn_text(question, self._num_new_images), list(self.history)
        prompt = self._encoded(history, turn)
        limits = [limit for limit in (options.max_length, self.assistant.model.context_window) if limit is not None]
        room = min(limits, default=len(prompt.ids) + options.max_new_tokens) - options.max_new_tokens
        while len(prompt.ids) > room and history:
            history, turn = _without_oldest(history, turn)
            prompt = self._encoded(history, turn)
        if len(prompt.ids) > room:
            pictures = prompt.num_images * self.assistant.model.encoder.num_image_tokens
            raise DataError(
                f"the question alone takes {len(prompt.ids)} positions ({pictures} of them show pictures), but the "
                f"window of {min(limits)} has {max(room, 0)} beside an answer of {options.max_new_tokens} "
                "(max_new_tokens): shorten the question or the answer, or start a new conversation"
            )
        if dropped := len(self.history) - len(history):
            self._notify(f"the conversation outgrew the window of {min(limits)}: its oldest turns ({dropped}) are gone")
            self.history, self._num_new_images = history, turn.count(IMAGE_TAG)
        return turn, prompt

    def _turn_text(self, question: str, num_images: int) -> str:
        return turn_text(self.assistant, [*[None] * num_images, question])

    def _encoded(self, history: list[Turn], turn: str) -> Encoded:
        return encode_conversation(self.assistant, history, turn)

    def _remember(self, turn: str, answer: str) -> None:
        self.history.append(Turn(turn, answer.replace(IMAGE_TAG, "")))
        self._num_new_images = 0


def _without_oldest(history: list[Turn], turn: str) -> tuple[list[Turn], str]:
    """The conversation without its oldest turn, whose images move to the front of the next one."""
    oldest, *others = history
    images = f"{IMAGE_PROMPT} " * oldest.prompt.count(IMAGE_TAG)
    if not others:
        return [], images + turn
    return [replace(others[0], prompt=images + others[0].prompt), *others[1:]], turn
