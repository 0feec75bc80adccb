"""``include: presets/24gb.yaml`` at the top of a YAML file: settings of another file under its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.yaml_source import REPOSITORY_ROOT, Problems, Source, find_existing, read_source, shown

KEY = "include"


def merge_included(source: Source, folder: Path, problems: Problems) -> None:
    """Takes the key ``include`` away and puts what the named file says under ``source``, whose own keys win.

    The file is looked for beside the one that names it, in ``folder``, then among the shipped ``train_configs``.
    Mappings are merged, lists are not. A file that is included includes no other. Raises ConfigError.
    """
    if KEY not in source.data:
        return
    name, place = source.data.pop(KEY), source.where(KEY)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{place}: {KEY}: found {name!r}, expected one file, e.g. presets/24gb.yaml")
    folders = (folder, REPOSITORY_ROOT / "train_configs")
    path = find_existing(name, folders)
    if path is None or not path.is_file():
        looked = " and ".join(dict.fromkeys(shown(item) for item in folders))
        presets = ", ".join(f"presets/{item.name}" for item in sorted((folders[1] / "presets").glob("*.yaml")))
        raise ConfigError(f"{place}: {KEY}: '{name}' not found in {looked}; shipped: {presets}")
    included = read_source(path, problems)
    if KEY in included.data:
        raise ConfigError(f"{included.where(KEY)}: {KEY}: a file that is included itself ({place}) includes no other")
    _put_under(source, source.data, included, included.data, "")


def _put_under(source: Source, own: dict[str, Any], included: Source, below: dict[str, Any], prefix: str) -> None:
    for name, value in below.items():
        key = f"{prefix}{name}"
        mine = own.get(name)
        if isinstance(value, dict) and (name not in own or mine is None or isinstance(mine, dict)):
            if not isinstance(mine, dict):
                own[name] = mine = {}
                source.origins.setdefault(key, included.where(key))
            _put_under(source, mine, included, value, f"{key}.")
        elif name not in own:
            own[name] = value
            source.origins.update(
                {item: place for item, place in included.origins.items() if item == key or item.startswith(f"{key}.")}
            )
