"""Published chat formats of MiniGPT-4 and MiniGPT-v2, rendered as text (registry kind 'template')."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.common.types import Turn

_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)


@dataclass(frozen=True)
class ChatTemplate:
    """System text, role strings and separator; ``stop`` are texts that end an answer besides the end token.

    ``is_training_format``: the chat uses the ids of training (``Encoder.encode_prompt``) instead of this text;
    the text is what the published evaluation scripts send.
    """

    description: str
    system: str
    user: str
    assistant: str
    sep: str
    stop: tuple[str, ...] = ()
    is_training_format: bool = False

    def render(self, history: Sequence[Turn], prompt: str) -> str:
        """The whole conversation up to the place where the answer to ``prompt`` starts."""
        text = self.system + self.sep
        for turn in history:
            text += self.user + turn.prompt + self.sep + self.assistant + turn.answer + self.sep
        return text + self.user + prompt + self.sep + self.assistant


TEMPLATES = {
    "vicuna_v0": ChatTemplate("MiniGPT-4 with Vicuna v0", _SYSTEM, "Human: ", "Assistant: ", "###", stop=("###",)),
    "llama2": ChatTemplate("MiniGPT-4 with Llama-2 chat", _SYSTEM, "<s>[INST] ", " [/INST] ", ""),
    "minigpt_v2": ChatTemplate(
        "MiniGPT-v2; chat follows the training format", "", "<s>[INST] ", " [/INST]", "", is_training_format=True
    ),
    "minigpt_v2_legacy": ChatTemplate(
        "MiniGPT-v2 as the published chat wrote it: BOS twice, no end symbol between turns",
        "",
        "<s>[INST] ",
        " [/INST]",
        "",
    ),
    "training": ChatTemplate(
        "The checkpoint's own prompt_template and end_sym, as in training", "", "", "", "", is_training_format=True
    ),
}
for _name, _template in TEMPLATES.items():
    registry.register("template", _name)(_template)
