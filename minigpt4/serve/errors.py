"""What goes wrong with one request, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """One refused request: HTTP status, a message for people, and what programs read.

    param: the field of the request. code: a word for the reason. retry_after: seconds, for busy servers.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """``Retry-After`` where waiting helps, ``WWW-Authenticate`` where a key is missing."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self.retry_after)} if self.retry_after else {}


def shown(value: object, limit: int = 60) -> str:
    """A value of a request as one short line for a message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
