"""Answers in the shape of OpenAI's chat completions: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from minigpt4.models.row_answers import Answer


@dataclass(frozen=True)
class Reply:
    """What all parts of one reply have in common."""

    model: str
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")

    def completion(self, answer: Answer) -> dict[str, Any]:
        """The whole reply."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(answer)}

    def first_chunk(self, with_usage: bool) -> bytes:
        """The event that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None, with_usage)

    def chunk(self, piece: str, with_usage: bool) -> bytes:
        """The event of one piece."""
        return self._chunk({"content": piece}, None, with_usage)

    def last_chunks(self, answer: Answer, with_usage: bool) -> bytes:
        """The events that close a stream: reason, usage if it was asked for, end."""
        events = self._chunk({}, finish_reason(answer), with_usage)
        if with_usage:
            events += event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(answer)})
        return events + b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None, with_usage: bool) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if with_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, answer: Answer) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answer.num_tokens,
            "total_tokens": self.prompt_tokens + answer.num_tokens,
        }


def finish_reason(answer: Answer) -> str:
    """stop: the model ended its answer, or a stop text did; length: the limit of tokens did."""
    return "stop" if answer.is_finished else "length"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
