"""One section of a file -> the frozen dataclass that owns it, with every mistake collected."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.errors import ConfigError
from minigpt4.common.yaml_source import Problems, Source, literal, owner_hint

SHORT_LIST = 12
"""So many names still fit a line that is read; longer lists stand in docs/CONFIG_REFERENCE.md."""


def build_section(
    cls: type[Any], layers: Sequence[tuple[Source, str, Mapping[str, Any]]], prefix: str, problems: Problems
) -> Any | None:
    """Merges ``layers`` (later wins) over ``cls``; None when its own checks cannot be passed.

    A layer is a source, the key in it where the section starts, and the values. Mistakes go to ``problems`` under
    ``prefix``; a wrong value counts as absent, so that the rest of the section is still checked.
    """
    kept = [_without_mistakes(cls, source, start, values, prefix, problems) for source, start, values in layers]
    base = _structured(typing.cast(Hashable, cls))
    while True:
        try:
            return OmegaConf.to_object(OmegaConf.merge(base, literal(merge_values(kept))))
        except ConfigError as error:  # from a __post_init__; its message names the key
            words = re.findall(r"\w+", str(error))
            key = next((word for word in words if any(word in values for values in kept)), "")
            owners = [index for index, values in enumerate(kept) if key in values]
            source, start, _ = layers[owners[-1] if owners else -1]
            name = _below(start, key) if owners else start
            problems.add(source.where(name), f"{prefix}.{key}" if owners else prefix, str(error))
            if not owners:
                return None
            for values in kept:
                values.pop(key, None)


def merge_values(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping of all layers: mappings are merged at every depth, anything else is replaced by the later layer."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            known = result.get(key)
            if isinstance(known, dict) and isinstance(value, Mapping):
                result[key] = merge_values([known, value])
            else:
                result[key] = value
    return result


def _without_mistakes(
    cls: type[Any], source: Source, start: str, values: Mapping[str, Any], prefix: str, problems: Problems
) -> dict[str, Any]:
    """``values`` without unknown keys and wrong types; those are reported."""
    if _fits(cls, values):
        return dict(values)
    hints: dict[str, Any] = typing.get_type_hints(cls)
    kept: dict[str, Any] = {}
    for key, value in values.items():
        where, name = source.where(_below(start, key)), f"{prefix}.{key}"
        hint = hints.get(key)
        if hint is None:
            problems.add(where, name, _unknown_key(key, hints))
        elif value is None and (dataclasses.is_dataclass(hint) or typing.get_origin(hint) in (dict, list)):
            kept[key] = {} if typing.get_origin(hint) is not list else []
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            kept[key] = _without_mistakes(hint, source, _below(start, key), value, name, problems)
        elif (item := _item_class(hint)) is not None and isinstance(value, list):
            kept[key] = _items(item, source, _below(start, key), value, name, problems)
        elif _fits(cls, {key: value}):
            kept[key] = value
        else:
            found = "nothing (null)" if value is None else f"{value!r} ({_kind(value)})"
            problems.add(where, name, f"found {found}, expected {describe(hint)}")
    return kept


def _item_class(hint: Any) -> type[Any] | None:
    """The dataclass of ``list[dataclass]``, else None."""
    inner = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return inner[0] if inner and isinstance(inner[0], type) and dataclasses.is_dataclass(inner[0]) else None


def _items(
    cls: type[Any], source: Source, start: str, values: Sequence[Any], prefix: str, problems: Problems
) -> list[dict[str, Any]]:
    kept = []
    for number, value in enumerate(values):
        place, name = f"{start}.{number}", f"{prefix}.{number}"
        if isinstance(value, Mapping):
            kept.append(_without_mistakes(cls, source, place, value, name, problems))
        else:
            keys = ", ".join(item.name for item in dataclasses.fields(cls))
            problems.add(source.where(place), name, f"found {value!r}, expected a mapping with the keys {keys}")
    return kept


def _unknown_key(key: str, known: Iterable[str]) -> str:
    """The complaint about ``key``: near names, or the section it belongs to; all names when they are few."""
    names = list(known)
    hint = owner_hint(key) or _near_keys(key, names)  # spelled right, in the wrong section
    if len(names) <= SHORT_LIST:
        return f"unknown key{hint}; allowed: {', '.join(names)}"
    return f"unknown key{hint}; all {len(names)} keys: docs/CONFIG_REFERENCE.md"


def _near_keys(key: str, names: Sequence[str]) -> str:
    """`` (did you mean 'a' or 'b'?)``: names spelled alike, else names that hold the word; may be empty."""
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    if close:
        best = difflib.SequenceMatcher(None, close[0], key).ratio()
        close = [name for name in close if difflib.SequenceMatcher(None, name, key).ratio() > best - 0.1]
    else:
        word = key.lower()
        close = [name for name in names if len(word) > 1 and word in name.split("_")][:3]
    return f" (did you mean {' or '.join(repr(name) for name in close)}?)" if close else ""


def _below(start: str, key: str) -> str:
    return f"{start}.{key}" if start else key  # a card starts at its root


@functools.cache
def _structured(cls: Hashable) -> DictConfig:
    base = OmegaConf.structured(cls)
    assert isinstance(base, DictConfig)
    return base  # merging copies it


def _fits(cls: type[Any], values: Mapping[str, Any]) -> bool:
    try:
        OmegaConf.merge(_structured(typing.cast(Hashable, cls)), literal(values))
    except (OmegaConfBaseException, TypeError):  # TypeError: a list where a mapping belongs
        return False
    return True


def _kind(value: Any) -> str:
    names = {str: "text", int: "integer", float: "number", bool: "true/false", dict: "mapping", list: "list"}
    return names.get(type(value), type(value).__name__)


def describe(hint: Any) -> str:
    """A type as a user reads it: 'integer', 'list of text', 'number or null'."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(str(part) for part in typing.get_args(hint))
    if origin is list:
        return f"a list of {describe(typing.get_args(hint)[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
