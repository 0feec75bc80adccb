"""The user's file while it is being checked: sections, registered names and paths, each with its complaint."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.yaml_source import Problems, Source, find_existing

log = logging.getLogger(__name__)

DATA_PATH_KEYS = ("ann_path", "image_path", "storage", "data_dir")
"""Keys of ``build_info``, at any depth, whose values are files or directories."""
PLACEHOLDER = re.compile(r"path/to|<[^<>]*>|please set|(?:^|[^a-z])your(?:$|[^a-z])", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REMOTE = re.compile(r"[a-z0-9+]+://|pipe:")


@dataclass
class ConfigFile:
    """``roots``: where relative paths are looked up, in order. ``default_prompts``: the model's prompt file.

    Without ``check_data`` files of data sets may be missing, without ``check_weights`` those of weights.
    """

    source: Source
    problems: Problems
    roots: tuple[Path, ...]
    check_data: bool
    check_weights: bool
    default_prompts: list[str] = field(default_factory=list)

    def complain(self, key: str, message: str) -> None:
        """Adds one line under the place where ``key`` was written."""
        self.problems.add(self.source.where(key), key, message)

    def section(self, name: str) -> dict[str, Any] | None:
        """The mapping under ``name``, or None after a complaint. An empty section is an empty mapping."""
        content = self.source.data.get(name, {})
        if name not in self.source.data:
            self.complain(name, "missing section; a file holds model, datasets and run")
        elif content is not None and not isinstance(content, dict):
            self.complain(name, f"found {content!r}, expected a mapping")
        else:
            return content or {}
        return None

    def named(self, kind: str, name: Any, key: str) -> Any | None:
        """The registered object, or None after a complaint that lists the known names."""
        try:
            return registry.get(kind, str(name))
        except ConfigError as error:
            self.complain(key, str(error))
            return None

    def path(self, key: str, value: str, extra: Sequence[Path] = ()) -> str:
        """``value`` as an absolute path; unchanged after a complaint when nothing is there, and for URLs."""
        if _REMOTE.match(value) or self.is_placeholder(key, value):
            return value
        found = find_existing(value, (*self.roots, *extra))
        if found is None:
            self.complain(key, f"'{value}' not found{self._looked_in(value)}")
        return value if found is None else str(found)

    def path_if_there(self, key: str, value: str) -> str:
        """``value`` as an absolute path where something is there; as it stands otherwise, without a complaint."""
        found = find_existing(value, self.roots)
        return value if found is None else str(found)

    def weights(self, key: str, value: str) -> str:
        """Like ``path``; a file that is not where the text says is also looked for by name in MINIGPT4_WEIGHTS."""
        moved = self._in_weights_folder(key, value)
        if moved is None and not self.check_weights:
            moved = find_existing(value, self.roots) or Path(value)
        return str(moved) if moved is not None else self.path(key, value)

    def language_model(self, value: str) -> str:
        """A directory as an absolute path, or an id of the Hugging Face hub as it stands."""
        key = "model.llama_model"
        if not value and key in self.problems.keys:
            return value  # a value was written, and has been refused
        if not value:
            self.complain(key, "is empty; give a directory in Hugging Face format, or an id such as org/name")
            return value
        if self.check_weights and self.is_placeholder(key, value):
            return value
        found = find_existing(value, self.roots) or self._in_weights_folder(key, value)
        if found is not None:
            if not found.is_dir():
                self.complain(key, f"'{value}' is a file, expected a directory in Hugging Face format")
            return str(found)
        if not self.check_weights:
            return value
        # 'weights/vicuna' has the shape of an id; where a folder 'weights' exists the user means a path
        is_path = find_existing(value.partition("/")[0], self.roots) is not None
        if is_path or not _HUB_ID.fullmatch(value):
            hint = "an id of the Hugging Face hub reads org/name"
            self.complain(key, f"'{value}' not found{self._looked_in(value)}; {hint}")
        return value

    def build_info(self, key: str, info: Mapping[str, Any], must_exist: bool) -> dict[str, Any]:
        """``info`` with absolute paths where they exist. What is missing is for the builder to report.

        Placeholders are reported here, when the data ``must_exist``.
        """
        result: dict[str, Any] = {}
        for name, value in info.items():
            inner = f"{key}.{name}"
            if isinstance(value, dict):
                result[name] = self.build_info(inner, value, must_exist)
            elif name in DATA_PATH_KEYS and isinstance(value, str):
                result[name] = self.data_path(inner, value, must_exist)
            elif name in DATA_PATH_KEYS and isinstance(value, list):
                result[name] = [self.data_path(inner, str(item), must_exist) for item in value]
            else:
                result[name] = value
        return result

    def data_path(self, key: str, value: str, must_exist: bool) -> str:
        """``value``, a file, folder or brace pattern of shards, as an absolute path where it exists."""
        if not value or _REMOTE.match(value) or (must_exist and self.is_placeholder(key, value)):
            return value
        # a brace pattern of shards, {00000..01255}.tar, is no file: look for the folder in front of it
        parts = value.split("/")
        plain = next((index for index, part in enumerate(parts) if "{" in part), len(parts))
        head = "/".join(parts[:plain]) or "."
        data = Path(os.environ.get("MINIGPT4_DATA", "data"))  # where cards expect the published folders
        found = find_existing(head, (*self.roots, data))
        return value if found is None else "/".join([str(found), *parts[plain:]])

    def is_placeholder(self, key: str, value: str) -> bool:
        """True, after a complaint, for text that an example file leaves for the user to replace."""
        if not PLACEHOLDER.search(value):
            return False
        self.complain(key, f"found the placeholder '{value}'; give a path that exists")
        return True

    def _in_weights_folder(self, key: str, value: str) -> Path | None:
        folder = os.environ.get("MINIGPT4_WEIGHTS", "")
        if not folder or find_existing(value, self.roots) is not None or PLACEHOLDER.search(value):
            return None
        found = find_existing(Path(value).name, [Path(folder)])
        if found is not None:
            log.warning("%s: %s: '%s' not found, using %s", self.source.where(key), key, value, found)
        return found

    def _looked_in(self, value: str) -> str:
        if Path(value).expanduser().is_absolute():
            return ""
        return "; looked in " + ", ".join(dict.fromkeys(str(root) for root in self.roots))
