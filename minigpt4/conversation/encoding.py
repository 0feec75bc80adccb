"""Turns to ids and labels: the same code for training, chat and evaluation.

Sequence of one sample (MiniGPT-4 format): BOS, prompt, answer + end symbol, and for every later turn
BOS, prompt, answer + end symbol. Each text segment between images is tokenised on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minigpt4.common.errors import DataError
from minigpt4.common.types import IGNORE_INDEX, IMAGE_TAG, IMAGE_TOKEN, Encoded, Turn
from minigpt4.conversation.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """What a model needs to turn text into ids.

    num_image_tokens  positions per image.
    prompt_template   '[INST] {} [/INST]' or the like; '' = none.
    wrap              put single instructions into the template too (``chat_template``); conversations always are.
    end_sym           text appended to every answer.
    max_txt_len       cap of the answer part (everything after the first prompt), in tokens.
    max_context_len   cap of the first prompt when it holds an image, in positions, BOS not counted.
    """

    tokenizer: Tokenizer
    num_image_tokens: int
    prompt_template: str = ""
    wrap: bool = False
    end_sym: str = "\n"
    max_txt_len: int = 160
    max_context_len: int = 3800

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer besides the end token: the end symbol, unless it is that token."""
        is_end_token = self.tokenizer.encode(self.end_sym) == [self.tokenizer.eos_id]
        return () if is_end_token or not self.end_sym else (self.end_sym,)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer besides the end token: an end symbol of one id, which may vanish from decoded text."""
        ids = self.tokenizer.encode(self.end_sym)
        return tuple(ids) if len(ids) == 1 and ids != [self.tokenizer.eos_id] else ()

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
        context = self._cut_context(self._segments(self._wrapped(turns[0].prompt, is_conversation)))
        ids, labels = self._answer(turns[0].answer)
        for turn in turns[1:]:
            question = self._bos() + self._segments(self._wrapped(turn.prompt, is_conversation))
            answer_ids, answer_labels = self._answer(turn.answer)
            ids += question + answer_ids
            labels += [IGNORE_INDEX] * len(question) + answer_labels
        is_truncated = len(ids) > self.max_txt_len
        kept = self._whole_images(ids, self.max_txt_len)
        all_ids = self._bos() + context + ids[:kept]
        all_labels = [IGNORE_INDEX] * (len(all_ids) - kept) + labels[:kept]
        all_labels[0] = IGNORE_INDEX
        return Encoded(all_ids, all_labels, self._count_images(all_ids), is_truncated)

    def encode_prompt(self, history: Sequence[Turn], prompt: str) -> Encoded:
        """Ids up to the place where the answer to ``prompt`` starts; ``history`` keeps its end symbols.

        The ids equal the training ids of the same turns, uncut: a chat in the trained format.
        """
        is_conversation = bool(history)
        ids: list[int] = []
        for turn in history:
            ids += self._bos() + self._segments(self._wrapped(turn.prompt, is_conversation))
            ids += self._answer(turn.answer)[0]
        ids += self._bos() + self._segments(self._wrapped(prompt, is_conversation))
        return Encoded(ids, [IGNORE_INDEX] * len(ids), self._count_images(ids))

    def encode_text(self, text: str) -> Encoded:
        """Ids of a prompt that is already rendered: BOS, then the text as it is (published chat and evaluation)."""
        ids = self._bos() + self._segments(text)
        return Encoded(ids, [IGNORE_INDEX] * len(ids), self._count_images(ids))

    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

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
