"""Kind and name -> object. The only mutable global of the package; filled by ``minigpt4.catalog.load``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from minigpt4.common.errors import ConfigError, nearest

KINDS = (
    "model", "builder", "task", "runner", "processor", "format", "template", "lr_scheduler", "metric", "face_set",
)  # fmt: skip

T = TypeVar("T")


class Registry:
    """Names that YAML may use. A name is registered once; a miss lists what is known."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}

    def register(self, kind: str, name: str) -> Callable[[T], T]:
        """Decorator: ``@registry.register("model", "minigpt_v2")``. Raises ConfigError when the name is taken."""
        if kind not in self._entries:
            raise ConfigError(f"unknown registry kind '{kind}', known: {', '.join(KINDS)}")

        def add(entry: T) -> T:
            known = self._entries[kind].get(name)
            if known is not None and known is not entry:
                raise ConfigError(f"{kind} '{name}' is registered twice: {known!r} and {entry!r}")
            self._entries[kind][name] = entry
            return entry

        return add

    def get(self, kind: str, name: str) -> Any:
        """The registered object. Raises ConfigError that lists the known names and the nearest one."""
        entries = self._entries[kind]
        if name not in entries:
            known = ", ".join(sorted(entries)) or "none"
            raise ConfigError(f"unknown {kind} '{name}'{nearest(name, entries)}; known: {known}")
        return entries[name]

    def names(self, kind: str) -> list[str]:
        """Registered names of one kind, sorted."""
        return sorted(self._entries[kind])


registry = Registry()
