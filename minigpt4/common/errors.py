"""Errors a user can fix. Each message says what was found where, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MiniGPT4Error(Exception):
    """Base of every error that is the user's to fix; the command line prints it without a traceback."""


class ConfigError(MiniGPT4Error):
    """A mistake in a YAML file or in ``--options``. May hold several messages, one per line."""


class DataError(MiniGPT4Error):
    """A record, an annotation file or an image that cannot be used."""


class CheckpointError(MiniGPT4Error):
    """Weights that do not fit the model, or a checkpoint that is incomplete."""


class OutputError(MiniGPT4Error):
    """A file or folder that cannot be written: no space, no permission, a quota."""


class RunError(MiniGPT4Error):
    """A process of the run is gone or does not answer: another rank, or a worker that loads data."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, [str(item) for item in known], n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
