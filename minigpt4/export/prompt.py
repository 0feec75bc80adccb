"""The chat's prompt format as plain values, for code that is not ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT
from minigpt4.conversation.templates import ChatTemplate
from minigpt4.models.generation import GenerateOptions

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant


def prompt_format(assistant: Assistant) -> dict[str, Any]:
    """Style "training" (instruction template, end symbol), "turns" (the tokenizer's own chat template) or "chat" (texts
    of a published chat)."""
    template: ChatTemplate = registry.get("template", assistant.template)
    encoder = assistant.model.encoder
    if not template.is_training_format:
        return {"style": "chat", **{key: getattr(template, key) for key in ("system", "user", "assistant", "sep")}}
    if encoder.turn_format is not None:
        shape = encoder.turn_format
        texts = {"first": list(shape.first), "later": list(shape.later), "lead": shape.lead}
        return {"style": "turns", **texts, "end_sym": encoder.end_sym}
    before, after = encoder.prompt_template.split("{}") if encoder.prompt_template else ("", "")
    return {"style": "training", "before": before, "after": after, "wrap": encoder.wrap, "end_sym": encoder.end_sym}


def bos_id(assistant: Assistant) -> int | None:
    """Id in front of every prompt; None where there is none, or where the text of the prompt holds it."""
    encoder = assistant.model.encoder
    return None if encoder.turn_format is not None else encoder.tokenizer.bos_id


def prompt_text(assistant: Assistant, question: str) -> str:
    """The first question about an image as text; the ids of its parts are what the chat sends behind ``bos_id``."""
    cleaned = assistant.question_processor(question)
    template: ChatTemplate = registry.get("template", assistant.template)
    if not template.is_training_format:
        return template.render([], f"{IMAGE_PROMPT} {cleaned}")
    shape = prompt_format(assistant)
    if shape["style"] == "turns":
        before, after = shape["first"]
        return str(before + f"{IMAGE_PROMPT} {cleaned}".strip() + after)
    turn = f"{IMAGE_PROMPT} {cleaned} "
    return f"{shape['before']}{turn}{shape['after']}" if shape["wrap"] else turn


def endings(assistant: Assistant) -> tuple[list[str], list[int]]:
    """Texts that end an answer, and ids that do: the end token, and an end symbol of one id."""
    options = assistant.stopping(GenerateOptions())
    return list(options.stop), list(dict.fromkeys([assistant.model.encoder.tokenizer.eos_id, *options.stop_ids]))
