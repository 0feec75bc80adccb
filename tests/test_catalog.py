"""The catalog is the whole list: every module of the package that registers a name is in it."""

from __future__ import annotations

import ast

import pytest

from minigpt4 import catalog
from minigpt4.common.registry import registry
from tests.config_fakes import REPOSITORY


def registering_modules() -> list[str]:
    """Modules with a call of ``registry.register`` outside of comments and strings."""
    found = []
    for path in sorted((REPOSITORY / "minigpt4").rglob("*.py")):
        calls = (
            node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        )
        names = (ast.unparse(call) for call in calls if isinstance(call, ast.Attribute))
        if "registry.register" in names:
            found.append(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    return found


def test_the_catalog_lists_every_module_that_registers_a_name() -> None:
    assert sorted(catalog.MODULES) == registering_modules()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("model", {"minigpt4", "minigpt_v2"}),
        ("task", {"image_text_pretrain"}),
        ("runner", {"runner_base"}),
        ("processor", {"blip2_image_train", "blip2_image_eval", "blip_caption"}),
        ("lr_scheduler", {"linear_warmup_cosine_lr", "linear_warmup_step_lr"}),
        ("format", {"conversation", "caption", "vqa", "text", "classification", "mapping", "auto"}),
        ("builder", {"annotations"}),
    ],
)
def test_names_of_the_first_versions_are_registered(kind: str, names: set[str]) -> None:
    catalog.load()
    assert names <= set(registry.names(kind))
