"""Steps of a pipeline that are run once: a step whose inputs did not change is reused and says so."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.files import write_atomically


@dataclass(frozen=True)
class Done:
    """A finished step: what it made, and what it took when it ran."""

    key: str
    result: str
    seconds: float
    cpu_seconds: float


class Steps:
    """Runs steps and remembers them in ``<folder>/steps.json``."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.file, self.console = folder / "steps.json", console
        self.done: dict[str, Done] = {}
        if self.file.is_file():
            self.done = {name: Done(**entry) for name, entry in json.loads(self.file.read_text()).items()}
        self.used: list[Done] = []

    def run(self, name: str, title: str, inputs: Sequence[str], action: Callable[[], str]) -> str:
        """The result (a path, or JSON text) of ``action``, or of an earlier run with the same ``inputs``."""
        key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
        earlier = self.done.get(name)
        if earlier is not None and earlier.key == key and _is_there(earlier.result):
            self.console.print(f"[dim]{title}: reused from an earlier run[/dim]", highlight=False)
            self.used.append(earlier)
            return earlier.result
        self.console.rule(f"[bold]{title}", align="left")
        begun, cpu = time.perf_counter(), _cpu_seconds()
        result = action()
        finished = Done(key, result, time.perf_counter() - begun, _cpu_seconds() - cpu)
        self.done[name] = finished
        self.used.append(finished)
        write_atomically(self.file, json.dumps({n: asdict(entry) for n, entry in self.done.items()}, indent=1))
        return result

    def totals(self) -> tuple[float, float]:
        """Seconds and CPU-seconds of all steps, also of those reused (as measured when they ran)."""
        return sum(entry.seconds for entry in self.used), sum(entry.cpu_seconds for entry in self.used)


def call(arguments: Sequence[str], folder: Path) -> None:
    """Run a Python program of the repository. Raises MiniGPT4Error when it fails; its own output says why."""
    code = subprocess.run([sys.executable, *arguments], cwd=folder, env=os.environ, check=False).returncode
    if code != 0:
        raise MiniGPT4Error(f"'python {' '.join(arguments)}' ended with exit code {code}")


def _is_there(result: str) -> bool:
    return result.startswith(("{", "[", '"')) or Path(result).exists()


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
