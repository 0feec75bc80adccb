"""Turns to ids and labels: the same code for training, chat and evaluation.

Sequence of one sample (MiniGPT-4 format): BOS, prompt, answer + end symbol, and for every later turn
BOS, prompt, answer + end symbol. Each text segment between images is tokenised on its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from minigpt4.common.errors import DataError
from minigpt4.common.schema import AUTO_END, TOKENIZER_TEMPLATE, ModelConfig
from minigpt4.common.types import IGNORE_INDEX, IMAGE_TAG, IMAGE_TOKEN, Encoded, Turn
from minigpt4.conversation.chat_template import TurnFormat, conversation, read_turn_format
from minigpt4.conversation.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """What a model needs to turn text into ids.

    num_image_tokens  positions per image.
    prompt_template   '[INST] {} [/INST]' or the like; '' = none.
    wrap              put single instructions into the template too (``chat_template``); conversations always are.
    end_sym           text appended to every answer.
    max_txt_len       cap of the answer part (everything after the first prompt), in tokens.
    max_context_len   cap of the first prompt when it holds an image, in positions, BOS not counted.
    turn_format       the tokenizer's own text around turns, in place of prompt_template; it writes BOS itself.
    """

    tokenizer: Tokenizer
    num_image_tokens: int
    prompt_template: str = ""
    wrap: bool = False
    end_sym: str = "\n"
    max_txt_len: int = 160
    max_context_len: int = 3800
    turn_format: TurnFormat | None = None

    @classmethod
    def from_config(cls, cfg: ModelConfig, num_image_tokens: int) -> Encoder:
        """The encoder of a model. Raises ConfigError when the tokenizer, or its chat template, is not usable."""
        tokenizer = load_tokenizer(cfg.llama_model)
        own = None
        if cfg.prompt_template == TOKENIZER_TEMPLATE:
            own = read_turn_format(tokenizer.render, tokenizer.special, cfg.llama_model)
        end_sym = cfg.end_sym
        if end_sym == AUTO_END:
            end_sym = own.end if own is not None else tokenizer.spell([tokenizer.eos_id])
        encoder = cls(
            tokenizer=tokenizer,
            num_image_tokens=num_image_tokens,
            prompt_template="" if own is not None else cfg.prompt_template,
            wrap=cfg.wraps_prompts,
            end_sym=end_sym,
            max_txt_len=cfg.max_txt_len,
            max_context_len=cfg.max_context_len,
            turn_format=own,
        )
        return encoder if own is None else _like_tokenizer(encoder, own, cfg.llama_model)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer besides the end token: other end tokens of the model, and the end symbol where it is
        one id or holds a special token, which vanishes from decoded text."""
        ids = self.tokenizer.encode(self.end_sym)
        found = (*self.tokenizer.end_ids, *(self._end_tokens() or (ids if len(ids) == 1 else ())))
        return tuple(number for number in dict.fromkeys(found) if number != self.tokenizer.eos_id)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer besides the end tokens: the end symbol, unless a special token tells of it."""
        return () if self._end_tokens() or not self.end_sym else (self.end_sym,)

    def _end_tokens(self) -> list[int]:
        special = self.tokenizer.special.values()
        return [number for number in self.tokenizer.encode(self.end_sym) if number in special][:1]

    def spell(self, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
        """Pieces of text and whether they are supervised; special tokens are spelled, an image is '[image x 64]'."""
        pieces: list[tuple[str, bool]] = []
        start = 0
        for end in range(1, len(ids) + 1):
            kind = (ids[start] == IMAGE_TOKEN, labels[start] != IGNORE_INDEX)
            if end < len(ids) and (ids[end] == IMAGE_TOKEN, labels[end] != IGNORE_INDEX) == kind:
                continue
            is_image, is_supervised = kind
            text = f"[image x {end - start}]" if is_image else self.tokenizer.spell(ids[start:end])
            pieces.append((text, is_supervised))
            start = end
        return pieces

    def encode_turns(self, turns: Sequence[Turn]) -> Encoded:
        """Training ids and labels of one sample; only answers and their end symbols are supervised."""
        if not turns:
            raise DataError("a sample without turns cannot be encoded")
        is_conversation = len(turns) > 1
        start, context = self._question(turns[0].prompt, is_conversation, is_first=True)
        length = len(context)
        context = self._cut_context(context)
        ids, labels = self._answer(turns[0].answer)
        for turn in turns[1:]:
            question = sum(self._question(turn.prompt, is_conversation, is_first=False), [])
            answer_ids, answer_labels = self._answer(turn.answer)
            ids += question + answer_ids
            labels += [IGNORE_INDEX] * len(question) + answer_labels
        is_truncated = len(ids) > self.max_txt_len
        kept = self._whole_images(ids, self.max_txt_len)
        all_ids = start + context + ids[:kept]
        all_labels = [IGNORE_INDEX] * (len(all_ids) - kept) + labels[:kept]
        all_labels[0] = IGNORE_INDEX
        return Encoded(all_ids, all_labels, self._count_images(all_ids), is_truncated, len(context) < length)

    def encode_prompt(self, history: Sequence[Turn], prompt: str) -> Encoded:
        """Ids up to the place where the answer to ``prompt`` starts; ``history`` keeps its end symbols.

        The ids equal the training ids of the same turns, uncut: a chat in the trained format.
        """
        is_conversation = bool(history)
        ids: list[int] = []
        for turn in history:
            ids += sum(self._question(turn.prompt, is_conversation, is_first=not ids), [])
            ids += self._answer(turn.answer)[0]
        ids += sum(self._question(prompt, is_conversation, is_first=not ids), [])
        return Encoded(ids, [IGNORE_INDEX] * len(ids), self._count_images(ids))

    def encode_text(self, text: str) -> Encoded:
        """Ids of a prompt that is already rendered: BOS, then the text as it is (published chat and evaluation)."""
        ids = self._bos() + self._segments(text)
        return Encoded(ids, [IGNORE_INDEX] * len(ids), self._count_images(ids))

    def encode_answer(self, answer: str) -> list[int]:
        """Ids of an answer and its end symbol, as they follow a prompt; not cut."""
        return self._answer(answer)[0]

    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def _question(self, prompt: str, is_conversation: bool, is_first: bool) -> tuple[list[int], list[int]]:
        """BOS or nothing, and the ids of ``prompt`` with the text around it."""
        if self.turn_format is None or prompt == IMAGE_TAG:
            return self._bos(), self._segments(self._wrapped(prompt, is_conversation))
        before, after = self.turn_format.first if is_first else self.turn_format.later
        return [], self._segments(before + prompt.strip() + after)

    def _wrapped(self, prompt: str, is_conversation: bool) -> str:
        # A bare image is stage 1: [BOS][image][caption], no text around it.
        if not self.prompt_template or prompt == IMAGE_TAG or not (self.wrap or is_conversation):
            return prompt
        before, after = self.prompt_template.split("{}")
        return f"{before}{prompt}{after}"

    def _segments(self, text: str) -> list[int]:
        first, *others = text.split(IMAGE_TAG)
        ids = self.tokenizer.encode(first)
        for segment in others:
            ids += [IMAGE_TOKEN] * self.num_image_tokens + self.tokenizer.encode(segment)
        return ids

    def _answer(self, answer: str) -> tuple[list[int], list[int]]:
        if self.turn_format is not None:  # many templates strip texts: so do we, for all of them
            answer = self.turn_format.lead + answer.strip()
        ids = self.tokenizer.encode(answer + self.end_sym)
        return ids, list(ids)

    def _cut_context(self, ids: list[int]) -> list[int]:
        # Text-only prompts are never cut, as in the reference.
        if IMAGE_TOKEN not in ids or len(ids) <= self.max_context_len:
            return ids
        kept = self._whole_images(ids, self.max_context_len)
        if IMAGE_TOKEN not in ids[:kept]:
            raise DataError(
                f"max_context_len {self.max_context_len} leaves no room for an image of "
                f"{self.num_image_tokens} positions"
            )
        return ids[:kept]

    def _whole_images(self, ids: list[int], limit: int) -> int:
        """The largest cut <= limit that does not split an image."""
        if len(ids) <= limit:
            return len(ids)
        end = limit
        if ids[end] == IMAGE_TOKEN:
            inside = ids[:end].count(IMAGE_TOKEN) % self.num_image_tokens
            end -= inside
        return end

    def _count_images(self, ids: list[int]) -> int:
        return ids.count(IMAGE_TOKEN) // self.num_image_tokens


def _like_tokenizer(encoder: Encoder, own: TurnFormat, name: str) -> Encoder:
    """``encoder`` with or without the lead of answers, whichever gives the ids of the tokenizer's own rendering.

    Warns, with an example, when neither does. The template's own end is compared, not one written by hand.
    """
    questions, answers = ("What is this?", "What colour is it?", "Sure?"), ("A small cat.", "It is grey.")
    wanted = encoder.tokenizer.encode(encoder.tokenizer.render(conversation(questions, answers), True))
    history = [Turn(question, answer) for question, answer in zip(questions[:-1], answers, strict=True)]
    found: list[int] = []
    for lead in dict.fromkeys(("", own.lead)):
        with_lead = replace(own, lead=lead)
        found = replace(encoder, turn_format=with_lead, end_sym=own.end).encode_prompt(history, questions[-1]).ids
        if found == wanted:
            return replace(encoder, turn_format=with_lead)
    differs = [a != b for a, b in zip(wanted, found, strict=False)]
    place = differs.index(True) if True in differs else len(differs)
    theirs, ours = (encoder.tokenizer.spell(ids[max(place - 3, 0) : place + 5]) for ids in (wanted, found))
    log.warning(
        "the chat template of %s does not write a conversation turn by turn: where it has %r, training and chat here "
        "have %r",
        name, theirs, ours,
    )  # fmt: skip
    return encoder
