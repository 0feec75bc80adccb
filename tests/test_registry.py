"""A name is registered once, and a miss teaches the known names."""

from __future__ import annotations

import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import KINDS, Registry


def test_a_registered_object_is_returned_unchanged() -> None:
    registry = Registry()

    @registry.register("task", "walk")
    class Walk:
        pass

    assert registry.get("task", "walk") is Walk
    assert registry.names("task") == ["walk"]


def test_a_miss_lists_the_known_names_and_the_nearest() -> None:
    registry = Registry()
    for name in ("minigpt4", "minigpt_v2"):
        registry.register("model", name)(object())
    with pytest.raises(
        ConfigError, match=r"unknown model 'minigpt_v3' \(did you mean 'minigpt_v2'\?\); known: minigpt4, min"
    ):
        registry.get("model", "minigpt_v3")


def test_a_miss_in_an_empty_kind_says_so() -> None:
    with pytest.raises(ConfigError, match="unknown runner 'x'; known: none"):
        Registry().get("runner", "x")


def test_a_name_belongs_to_one_object() -> None:
    registry = Registry()
    registry.register("format", "talk")(len)
    registry.register("format", "talk")(len)  # the same module imported twice does no harm
    with pytest.raises(ConfigError, match="format 'talk' is registered twice"):
        registry.register("format", "talk")(max)


def test_kinds_are_separate() -> None:
    registry = Registry()
    registry.register("task", "same")(1)
    registry.register("runner", "same")(2)
    assert (registry.get("task", "same"), registry.get("runner", "same")) == (1, 2)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"unknown registry kind 'modle', known: {KINDS[0]}"):
        Registry().register("modle", "x")
