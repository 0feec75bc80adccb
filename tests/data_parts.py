"""Blocks of YAML and files that tests of the data layer share."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from PIL import Image

import minigpt4.datasets.builders.align
import minigpt4.datasets.builders.annotations
import minigpt4.datasets.builders.faces
import minigpt4.datasets.builders.published
import minigpt4.datasets.builders.shards
import minigpt4.datasets.talks
import minigpt4.processors.image
import minigpt4.processors.text  # noqa: F401  (these imports register the names)
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig
from minigpt4.datasets.builders.base import DatasetBuilder, ImageSpec
from minigpt4.datasets.cards import find_card

GOLDEN = Path(__file__).parent / "golden" / "datasets"
SPEC = ImageSpec(56)


def builder(name: str, block: Mapping[str, Any], prompts: tuple[str, ...] = (), image: Any = SPEC) -> DatasetBuilder:
    """The builder of a YAML block over the card of that name, if there is one."""
    card = find_card(name)
    layers = [] if card is None else [yaml.safe_load(card.read_text(encoding="utf-8"))["datasets"][name]]
    layers.append(dict(block))
    chosen = [layer["builder"] for layer in layers if "builder" in layer]
    cls = registry.get("builder", chosen[-1] if chosen else DatasetConfig.builder)
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls.Config), *layers, {"name": name}))
    made: DatasetBuilder = cls(cfg, image, prompts)
    return made


def json_file(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def faces(folder: Path, count: int) -> list[str]:
    """Small pictures of one colour each; their names."""
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.new("RGB", (9, 7), (number * 20 % 256, 90, 200)).save(folder / name)
    return names


def png(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def tar_file(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
