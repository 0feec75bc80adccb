"""One conversation about images: history, images encoded once, answers whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, Encoded, Turn
from minigpt4.conversation.templates import ChatTemplate
from minigpt4.models.generation import GenerateOptions


def open_image(path: str | Path) -> Image.Image:
    """A decoded picture. Raises DataError that names the file and what is wrong with it."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"image '{path}': no such file")
    try:
        image = Image.open(file)
        image.load()
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"image '{path}': not readable as a picture ({error})") from error
    return image


class ChatSession:
    """A conversation with one model. The prompt of a turn is what training showed for the same turns."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self.template: ChatTemplate = registry.get("template", assistant.template)
        self.history: list[Turn] = []
        self._features = torch.zeros(0)
        self._has_new_image = False
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and its images."""
        self.history = []
        self._features = torch.zeros(0, 3, 1, 1)
        self._has_new_image = False

    def set_image(self, image: Image.Image) -> None:
        """Start a new conversation about ``image``; it goes through the vision tower once."""
        pixels = self.assistant.image_processor(image)[None]  # [1, 3, S, S]
        self.reset()
        self._features = self._encode(pixels)
        self._has_new_image = True

    def ask(self, question: str, options: GenerateOptions) -> str:
        """The answer to ``question``; it joins the history."""
        turn, prompt = self._prompt(question)
        answer = self.assistant.model.generate([prompt], self._features, self._with_stop(options))[0]
        self._remember(turn, answer)
        return answer

    def stream(self, question: str, options: GenerateOptions) -> Iterator[str]:
        """Pieces of the answer as they come; the whole answer joins the history when the last piece was read."""
        turn, prompt = self._prompt(question)
        pieces = []
        for piece in self.assistant.model.generate_stream(prompt, self._features, self._with_stop(options)):
            pieces.append(piece)
            yield piece
        self._remember(turn, "".join(pieces))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        model = self.assistant.model
        with model.autocast():
            return model.vision_features(pixels.to(model.device))

    @staticmethod
    def first_prompt(assistant: Assistant, question: str) -> Encoded:
        """Ids of the first question about one image, as a conversation would send it."""
        return ChatSession(assistant)._prompt(question, has_image=True)[1]

    def _prompt(self, question: str, has_image: bool | None = None) -> tuple[str, Encoded]:
        encoder = self.assistant.model.encoder
        text = self.assistant.question_processor(question)
        has_image = self._has_new_image if has_image is None else has_image
        if self.template.is_training_format:
            # Instructions with an image, and all turns of a conversation, end in a space in training.
            turn = f"{IMAGE_PROMPT} {text} " if has_image else f"{text} "
            return turn, encoder.encode_prompt(self.history, turn)
        turn = f"{IMAGE_PROMPT} {text}" if has_image else text
        return turn, encoder.encode_text(self.template.render(self.history, turn))

    def _remember(self, turn: str, answer: str) -> None:
        self.history.append(Turn(turn, answer))
        self._has_new_image = False

    def _with_stop(self, options: GenerateOptions) -> GenerateOptions:
        encoder = self.assistant.model.encoder
        is_end_token = encoder.tokenizer.encode(encoder.end_sym) == [encoder.tokenizer.eos_id]
        spelled = () if is_end_token or not encoder.end_sym else (encoder.end_sym,)
        return replace(options, stop=tuple(dict.fromkeys((*options.stop, *self.template.stop, *spelled))))
