"""Tar shards, as img2dataset and webdataset write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from minigpt4.common.errors import DataError
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig
from minigpt4.datasets.builders.base import DatasetBuilder
from minigpt4.datasets.shards import ShardDataset, expand_shards


@dataclass(frozen=True)
class ShardsConfig(DatasetConfig):
    """Captions, unless ``format`` says otherwise."""

    builder: str = "shards"
    format: str = "caption"


@dataclass(frozen=True)
class ShardsInfo:
    """``build_info`` of tar shards."""

    storage: str | list[str] = ""  # local files: pattern `{00000..00099}.tar`, glob, folder, or a list of these


@registry.register("builder", "shards")
class ShardsBuilder(DatasetBuilder):
    """Tar files of img2dataset or webdataset: one picture and one ``.json`` or ``.txt`` per key."""

    Config: ClassVar[type[DatasetConfig]] = ShardsConfig
    Info: ClassVar[type[Any]] = ShardsInfo
    required: ClassVar[tuple[str, ...]] = ("storage",)

    def check_data(self) -> list[str]:
        """All shards exist, and samples of the first one can be read."""
        if self.cfg.val.fraction:
            return ["val.fraction: shards are not split; name tar files of their own in val.ann_path"]
        if self.cfg.balance.by:
            return ["balance: records of shards are not known before they are read; make one data set per group"]
        try:
            shards = self._shards("train")
        except DataError as error:
            return [f"build_info.storage: {error}"]
        dataset = self._dataset(shards[:1], "train")

        def look(index: int) -> None:
            try:
                dataset.load(index, Random(0))
            except DataError as error:
                raise DataError(f"{dataset.where(index)}: {error}") from None

        return self.spot_check(len(dataset), look)

    def build(self, split: str) -> ShardDataset:
        """Indexes what is not indexed yet, then opens nothing before the first sample."""
        if split == "val" and not self.cfg.val.ann_path:
            raise DataError(f"dataset '{self.cfg.name}': no val split; name tar files of their own in val.ann_path")
        dataset = self._dataset(self._shards(split), split)
        self.log_format(dataset.record(0), "tar shards", len(dataset))
        return dataset

    def _shards(self, split: str) -> list[Path]:
        if split == "val":
            return expand_shards(self.cfg.val.ann_path)
        return expand_shards(self.info().storage)

    def _dataset(self, shards: list[Path], split: str) -> ShardDataset:
        dataset = ShardDataset(self.cfg, self.recipe({"caption": ""}, split), shards)
        if self.cfg.format == "auto":  # the first record tells
            dataset.recipe = self.recipe(dataset.record(0), split)
        return dataset
