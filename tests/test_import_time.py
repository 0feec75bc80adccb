"""Configuration and help come without torch."""

from __future__ import annotations

import subprocess
import sys
import time
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


def best_of(count: int, *arguments: str) -> float:
    """Seconds of the fastest of ``count`` runs: a busy machine slows single ones."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - begin)
    return min(times)


def test_importing_the_configuration_takes_under_half_a_second() -> None:
    assert best_of(3, "-c", "import minigpt4.common.config") - best_of(3, "-c", "pass") < 0.5


def test_help_of_training_comes_at_once() -> None:
    assert "--cfg-path" in run("train.py", "--help")
    assert best_of(3, "train.py", "--help") < 1.5
