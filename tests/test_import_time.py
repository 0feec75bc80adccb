"""Configuration and help come without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "timm", "peft", "numpy", "PIL")


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout


@pytest.mark.parametrize("module", ["config", "schema", "types", "registry", "errors"])
def test_the_configuration_layer_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, minigpt4.common.{module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run("-c", code).strip() == "[]"


@pytest.mark.parametrize("command", ["train_command(['--help'])", "main(['--help'])", "main(['chat', '--help'])"])
def test_help_comes_without_anything_heavy(command: str) -> None:
    code = f"""
import sys
from minigpt4 import cli
try:
    cli.{command}
except SystemExit:
    print([name for name in {HEAVY!r} if name in sys.modules])
"""
    shown = run("-c", code).splitlines()
    assert shown[0].startswith("usage:") and shown[-1] == "[]"
