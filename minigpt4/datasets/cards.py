"""Data sets known by name: YAML files under ``configs/datasets``, found by the name they define."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

CARD_ROOT = Path(__file__).resolve().parent.parent / "configs" / "datasets"
_NAME = re.compile(r"^  ([A-Za-z0-9_+.-]+):", re.MULTILINE)
"""A card reads ``datasets:`` and, two spaces in, one name. No YAML parser is loaded for that."""


@cache
def _cards(root: Path) -> dict[str, Path]:
    cards: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        head = path.read_text(encoding="utf-8").partition("datasets:")[2]
        for name in _NAME.findall(head):
            assert name not in cards, f"{path} and {cards[name]} both define '{name}'"
            cards[name] = path
    return cards


def find_card(name: str) -> Path | None:
    """The YAML file that holds the defaults of data set ``name``."""
    return _cards(CARD_ROOT).get(name)


def known_cards() -> list[str]:
    """Names of all cards, sorted."""
    return sorted(_cards(CARD_ROOT))
