"""``minigpt4 ls``: every name that a YAML file may use, with one line each."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4 import catalog
from minigpt4.common.config import MODEL_DEFAULTS
from minigpt4.common.errors import ConfigError, nearest
from minigpt4.common.registry import KINDS, registry
from minigpt4.common.yaml_source import REPOSITORY_ROOT, shown
from minigpt4.datasets.cards import find_card, known_cards

PRESETS = "train_configs/presets"
CONFIG_FOLDERS = ("train_configs", PRESETS, "eval_configs")
WRITTEN_IN = {
    "model": "model.arch",
    "model_type": "model.arch and model.model_type: defaults to start from",
    "template": "model.chat_format",
    "builder": "datasets.NAME.builder",
    "format": "datasets.NAME.format",
    "processor": "datasets.NAME.vis_processor.train.name, text_processor.train.name",
    "task": "run.task",
    "runner": "run.runner",
    "lr_scheduler": "run.lr_sched",
    "metric": "run.valid.metrics, besides loss",
    "face_set": "eval_faces.py --dataset",
    "dataset": "blocks under datasets:, `minigpt4 cp NAME` copies one to edit",
    "config": "files for --cfg-path, those of presets/ for include:; `minigpt4 cp NAME` copies one to edit",
}
"""Kind -> where its names are used; the order of the listing."""
_SENTENCE_END = re.compile(r"(?<=\.)(?<!e\.g\.)(?<!i\.e\.)\s")


def main(argv: Sequence[str]) -> int:
    """Print the names; returns the exit code. Raises ConfigError for an unknown kind and a missing plugin."""
    given = build_parser().parse_args(argv)
    kinds = [find_kind(given.kind)] if given.kind else list(WRITTEN_IN)
    if set(kinds) & set(KINDS) or given.plugins:
        catalog.load(given.plugins)
    print("\n\n".join(render(kind) for kind in kinds))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 ls``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 ls",
        description="List the names that a YAML file may use, with one line each.",
        epilog="examples:\n  minigpt4 ls\n  minigpt4 ls format\n  minigpt4 ls datasets\n"
        "  minigpt4 ls builder --plugins my_builders\n\nkeys and their defaults: docs/CONFIG_REFERENCE.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"only these: {', '.join(WRITTEN_IN)}")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="your modules, as in run.plugins")
    return parser


def find_kind(text: str) -> str:
    """The kind that ``text`` names, in singular or plural. Raises ConfigError."""
    for kind in WRITTEN_IN:
        if text in (kind, f"{kind}s"):
            return kind
    raise ConfigError(f"unknown kind '{text}'{nearest(text, WRITTEN_IN)}; known: {', '.join(WRITTEN_IN)}")


def render(kind: str) -> str:
    """Heading and one line per name."""
    found = entries(kind)
    width = max((len(name) for name in found), default=0)
    lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in found.items()]
    if not lines:
        lines = ["  none: the examples come with a checkout of the repository" if kind == "config" else "  none"]
    return "\n".join([f"{kind} ({WRITTEN_IN[kind]})", *lines])


def entries(kind: str) -> dict[str, str]:
    """Name -> description of everything of one kind. The catalog must be loaded for registered kinds."""
    if kind == "dataset":
        return {name: comment_of(path) for name in known_cards() if (path := find_card(name)) is not None}
    if kind == "config":
        return {shown(path): comment_of(path) for path in example_files()}
    if kind == "model_type":
        return {path.stem.replace("-", " ", 1): comment_of(path) for path in model_types()}
    return {name: description(registry.get(kind, name)) for name in registry.names(kind)}


def example_files() -> list[Path]:
    """The YAML files of ``CONFIG_FOLDERS``; none where only the package is installed."""
    return [path for folder in CONFIG_FOLDERS for path in sorted((REPOSITORY_ROOT / folder).glob("*.yaml"))]


def model_types() -> list[Path]:
    """The YAML files ``<arch>-<model_type>.yaml`` with defaults of a model."""
    return sorted(MODEL_DEFAULTS.glob("*-*.yaml"))


def description(entry: Any) -> str:
    """The ``description`` of a registered object, else the first sentence of its docstring."""
    own = getattr(entry, "description", None)
    text = own if isinstance(own, str) else inspect.cleandoc(entry.__doc__ or "").partition("\n\n")[0]
    return first_sentence(text.replace("``", "`"))


def comment_of(path: Path) -> str:
    """The first sentence of the comment a YAML file begins with."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return first_sentence(" ".join(lines))


def first_sentence(text: str) -> str:
    """On one line, without its full stop."""
    return _SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0].removesuffix(".")
