"""``minigpt4 env``: versions and hardware for a bug report. Names of hosts, users and folders are left out."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from minigpt4.common.yaml_source import REPOSITORY_ROOT

PACKAGES = (
    "torchvision", "transformers", "timm", "peft", "bitsandbytes", "safetensors", "sentencepiece", "omegaconf",
    "pyyaml", "webdataset", "numpy", "pillow", "matplotlib", "rich", "wandb", "tensorboard", "gradio", "torchmetrics",
    "scikit-learn", "scikit-image",
)  # fmt: skip
"""What the package may use besides torch, which says more of itself."""
SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MINIGPT4_WEIGHTS", "MINIGPT4_DATA", "MINIGPT4_CACHE")
MISSING = "not installed"
_FOLDERS = re.compile(r"(?:[A-Za-z]:)?[^\s\\/'\":;,()]*[\\/](?:[^\\/'\":;,()\n]*[\\/])*")
"""The folders in front of a file name, on any system; names of folders may hold spaces."""


def main(argv: Sequence[str]) -> int:
    """Print the facts; returns the exit code."""
    given = build_parser().parse_args(argv)
    facts = collect()
    if given.json:
        print(json.dumps(facts, indent=2))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 env``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 env",
        description="Print versions and hardware for a bug report, without names of hosts, users and folders.",
        epilog="examples:\n  minigpt4 env\n  minigpt4 env --json > environment.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    return parser


def collect() -> dict[str, str]:
    """Name -> value, in the order of printing. A package that is missing is said to be."""
    return {
        "minigptface": version("minigptface"),
        "git commit": git_commit(),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "CPU cores": cpu_cores(),
        "memory": memory(),
        **torch_facts(),
        **{name: version(name) for name in PACKAGES},
        **{name: setting(name) for name in SETTINGS},
    }


def version(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def git_commit() -> str:
    """Hash of the checkout, and whether files differ from it."""
    if not (REPOSITORY_ROOT / ".git").exists():
        return "none (not a git checkout)"
    git = ("git", "-C", str(REPOSITORY_ROOT))
    commit, changes = answer_of(*git, "rev-parse", "HEAD"), answer_of(*git, "status", "--porcelain", "-uno")
    if commit is None or changes is None:
        return "unknown (git does not answer)"
    return commit + (f" with changes in {len(changes.splitlines())} files" if changes else "")


def answer_of(*command: str) -> str | None:
    """What another program prints; None when it is missing, fails or takes over ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_cores() -> str:
    """Cores of the machine, and those this process may use where the system tells."""
    count = os.cpu_count() or 0
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    usable = count if affinity is None else len(affinity(0))
    return str(count) if usable == count else f"{count}, usable here: {usable}"


def memory() -> str:
    """Size of the main memory."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not on Windows
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def torch_facts() -> dict[str, str]:
    """torch, the CUDA and cuDNN it was built with, and every GPU with its memory."""
    try:
        import torch
    except (ImportError, OSError) as error:  # also a torch whose libraries are broken: a bug report must say so
        reason = f"cannot be imported: {without_folders(str(error))}"
        return {"torch": MISSING if version("torch") == MISSING else reason}
    facts = {
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda or f"none ({'ROCm' if torch.version.hip else 'CPU'} build)",
        "cuDNN": cudnn_version(torch.backends.cudnn),
        "threads of torch": str(torch.get_num_threads()),
        "NVIDIA driver": nvidia_driver(),
    }
    if not torch.cuda.is_available():
        return {**facts, "GPU": "none usable"}
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        capability = f"compute capability {found.major}.{found.minor}"
        facts[f"GPU {number}"] = f"{found.name}, {found.total_memory / 2**30:.1f} GiB, {capability}"
    return facts


def nvidia_driver() -> str:
    """Version of the driver, which may be too old for the CUDA of torch."""
    found = answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else "none found"


def cudnn_version(cudnn: Any) -> str:
    """Number of the cuDNN that torch brings."""
    return str(cudnn.version() or "none")


def setting(name: str) -> str:
    """The value of an environment variable; of folders only whether it is set."""
    value = os.environ.get(name)
    if value is None:
        return "not set"
    return "set" if name.startswith("MINIGPT4_") else value


def without_folders(message: str) -> str:
    """``message`` with file names alone, as it may be published."""
    return _FOLDERS.sub("", message)
