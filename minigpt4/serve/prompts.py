"""A checked request to what the model reads: ids, and pixels of its pictures."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from minigpt4.chat.loading import Assistant
from minigpt4.chat.prompts import encode_conversation, turn_text
from minigpt4.common.errors import DataError
from minigpt4.common.types import IMAGE_TAG, Encoded, Turn
from minigpt4.models.generation import GenerateOptions
from minigpt4.serve.errors import ApiError
from minigpt4.serve.pictures import PictureLimits, read_picture
from minigpt4.serve.requests import ChatRequest, Message, Picture


@dataclass(frozen=True)
class Prepared:
    """prompt: ids. images: [3, S, S] each, one per picture of ``prompt``. options: with the room the window has."""

    prompt: Encoded
    images: tuple[Tensor, ...]
    options: GenerateOptions


class Preparer:
    """Writes requests as the chat of this model does. Safe to call from several threads."""

    def __init__(self, assistant: Assistant, limits: PictureLimits) -> None:
        self.assistant, self.limits = assistant, limits
        self._lock = threading.Lock()  # tokenizers do not all bear two threads

    def __call__(self, request: ChatRequest) -> Prepared:
        """Raises ApiError for prompts that do not fit, and as ``read_picture`` does."""
        try:
            with self._lock:
                prompt = self._encode(request)
        except DataError as error:
            raise ApiError(400, str(error), "messages", "invalid_prompt") from error
        options = self._fitting(prompt, request.options)  # before any picture is decoded
        pictures = [read_picture(p.url, self.limits) for message in request.messages for p in message.pictures]
        return Prepared(prompt, tuple(self.assistant.image_processor(p) for p in pictures), options)

    def _encode(self, request: ChatRequest) -> Encoded:
        *earlier, last = request.messages
        history = []
        for question, answer in zip(earlier[::2], earlier[1::2], strict=True):
            if IMAGE_TAG in answer.text:
                raise DataError(f"an answer must not hold '{IMAGE_TAG}', which stands for a picture")
            history.append(Turn(self._turn(question), answer.text))
        if IMAGE_TAG in request.system:
            raise DataError(f"a system text must not hold '{IMAGE_TAG}', which stands for a picture")
        return encode_conversation(self.assistant, history, self._turn(last), request.system)

    def _turn(self, message: Message) -> str:
        return turn_text(self.assistant, shown_parts(message.parts))

    def _fitting(self, prompt: Encoded, options: GenerateOptions) -> GenerateOptions:
        window = self.assistant.model.context_window
        if window is not None:
            room = window - len(prompt.ids)
            if room < 1:
                pictures = prompt.num_images * self.assistant.model.encoder.num_image_tokens
                raise ApiError(
                    400,
                    f"the messages take {len(prompt.ids)} positions ({pictures} of them show pictures), the window of "
                    f"the model has {window}, answer included",
                    "messages",
                    "context_length_exceeded",
                )
            options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
        return self.assistant.stopping(options)


def shown_parts(parts: Sequence[str | Picture]) -> list[str | None]:
    """Texts, and None for pictures, as a turn shows them.

    Pictures before or after all text stand in front of it, as in training; pictures between texts stay there.
    """
    texts = [place for place, part in enumerate(parts) if isinstance(part, str) and part.strip()]
    is_mixed = any(not isinstance(part, str) for part in parts[texts[0] : texts[-1]]) if texts else False
    kept = [part for part in parts if isinstance(part, Picture) or part.strip()]
    if is_mixed:
        return _joined([part if isinstance(part, str) else None for part in kept])
    pictures: list[str | None] = [None for part in kept if isinstance(part, Picture)]
    return _joined([*pictures, *(part for part in kept if isinstance(part, str))])


def _joined(parts: Sequence[str | None]) -> list[str | None]:
    """Texts that follow each other are one text, a line each."""
    joined: list[str | None] = []
    for part in parts:
        if part is not None and joined and joined[-1] is not None:
            joined[-1] += f"\n{part}"
        else:
            joined.append(part)
    return joined
