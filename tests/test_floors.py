"""Imports go down only: a file may import from its own floor's room or from lower floors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "minigpt4.datasets.cards": 0,  # finds YAML files of configs/; knows nothing of data sets
    "minigpt4.common": 0,
    "minigpt4.conversation": 1,
    "minigpt4.processors": 1,
    "minigpt4.metrics": 1,
    "minigpt4.datasets": 2,
    "minigpt4.models": 2,
    "minigpt4.tasks": 3,
    "minigpt4.chat": 3,
    "minigpt4.chat.command_line": 5,  # a program: parses, loads the catalog, runs
    "minigpt4.runners": 4,
    "minigpt4.evaluation": 4,
    "minigpt4.evaluation.command_line": 5,
    "minigpt4.evaluation.faces.command_line": 5,
    "minigpt4.tools": 5,
    "minigpt4.report": 5,
    "minigpt4.web": 5,
    "minigpt4.export": 5,
    "minigpt4.serve": 5,
    "minigpt4.catalog": 5,
    "minigpt4.cli": 5,
    "minigpt4.__main__": 5,
}
FILES = [path for path in sorted((ROOT / "minigpt4").rglob("*.py")) if path.name != "__init__.py"]


def room(module: str) -> str | None:
    """The longest entry of FLOORS that holds ``module``."""
    rooms = [name for name in FLOORS if module == name or module.startswith(f"{name}.")]
    return max(rooms, key=len) if rooms else None


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and module of every import, at the top or inside a function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "minigpt4" and name != "minigpt4"]


def upward(module: str, tree: ast.AST) -> list[str]:
    """Imports of ``module`` that go up, or sideways into another room of the same floor below the fifth."""
    own = room(module)
    assert own is not None, f"{module} stands on no floor; add it to FLOORS"
    wrong = []
    for line, name in imported(tree):
        target = room(name)
        if target is None:
            wrong.append(f"{module}:{line}: {name} stands on no floor")
        elif FLOORS[target] > FLOORS[own] or (own in SEPARATE and target in SEPARATE and own != target):
            wrong.append(f"{module}:{line}: imports {name} (floor {FLOORS[own]} -> {FLOORS[target]})")
    return wrong


SEPARATE = {"minigpt4.datasets", "minigpt4.models"}
"""Two rooms of one floor that meet in Batch only."""


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_down_only(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert upward(module, ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("minigpt4.common.x", "from minigpt4.models import base_model", True),
        ("minigpt4.common.x", "def f():\n    import minigpt4.tasks.y", True),
        ("minigpt4.datasets.x", "from minigpt4.models.vision import y", True),
        ("minigpt4.datasets.x", "from minigpt4.datasets.collate import y", False),
        ("minigpt4.runners.x", "from minigpt4.tasks.base_task import y", False),
        ("minigpt4.common.x", "from minigpt4.datasets.cards import find_card", False),
    ],
)
def test_the_rule_itself_sees_an_upward_import(module: str, code: str, wrong: bool) -> None:
    assert bool(upward(module, ast.parse(code))) is wrong


def test_package_files_are_empty() -> None:
    full = [str(path) for path in (ROOT / "minigpt4").rglob("__init__.py") if path.read_text(encoding="utf-8").strip()]
    assert full == []
