"""Questions, pictures and a system text to the ids that a model's template writes: for chats and for the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minigpt4.chat.loading import Assistant
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, IMAGE_TAG, Encoded, Turn
from minigpt4.conversation.chat_template import Message, read_turn_format
from minigpt4.conversation.encoding import Encoder
from minigpt4.conversation.templates import ChatTemplate


def turn_text(assistant: Assistant, parts: Sequence[str | None]) -> str:
    """The prompt of a turn: texts, and None for every picture, in the order they are shown.

    Raises DataError for a text that stands for a picture itself.
    """
    template: ChatTemplate = registry.get("template", assistant.template)
    if any(IMAGE_TAG in part for part in parts if part):
        raise DataError(f"a question must not hold '{IMAGE_TAG}', which stands for a picture")
    written = [IMAGE_PROMPT if part is None else assistant.question_processor(part) for part in parts]
    # Instructions with an image, and all turns of a conversation, end in a space in training.
    return " ".join(written) + (" " if template.is_training_format else "")


def encode_conversation(assistant: Assistant, history: Sequence[Turn], turn: str, system: str = "") -> Encoded:
    """Ids up to the place where the answer to ``turn`` starts; ``system`` takes the place of the template's own text.

    Raises DataError where the template has no place for a system text.
    """
    encoder = assistant.model.encoder
    template: ChatTemplate = registry.get("template", assistant.template)
    if not template.is_training_format:
        if system and not template.system:
            raise DataError(f"the template '{assistant.template}' of this model has no system text")
        text = (replace(template, system=system) if system else template).render(history, turn)
        return encoder.encode_text(text)
    return (_with_system(encoder, system) if system else encoder).encode_prompt(history, turn)


def _with_system(encoder: Encoder, system: str) -> Encoder:
    """The encoder whose first question stands behind ``system``, by the tokenizer's own chat template."""
    if encoder.turn_format is None:
        raise DataError("this model was trained without a system text: its prompts are questions and answers alone")

    def render(messages: Sequence[Message], opens_answer: bool) -> str:
        return encoder.tokenizer.render([{"role": "system", "content": system}, *messages], opens_answer)

    try:
        first = read_turn_format(render, encoder.tokenizer.special, "this model").first
    except ConfigError as error:
        raise DataError(f"the chat template of this model takes no such system text: {error}") from error
    if system.strip() not in first[0]:
        raise DataError("the chat template of this model leaves a system text out")
    return replace(encoder, turn_format=replace(encoder.turn_format, first=first))
