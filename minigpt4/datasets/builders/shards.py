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
from minigpt4.datasets.shards import ShardDataset, expand_shards, is_remote
from minigpt4.datasets.streams import StreamDataset, expand_addresses


@dataclass(frozen=True)
class ShardsConfig(DatasetConfig):
    """Captions, unless ``format`` says otherwise."""

    builder: str = "shards"
    format: str = "caption"


@dataclass(frozen=True)
class ShardsInfo:
    """``build_info`` of tar shards."""

    # local files are indexed: pattern `{00000..00099}.tar`, glob, folder; `https://`, `s3://`, `pipe:` are streamed
    storage: str | list[str] = ""  # one of these, or a list
    samples: int = 0  # streams only: how many samples they hold, about; needed, for it cannot be counted
    shuffle_buffer: int = 1000  # streams only: samples held back to be mixed, per loader worker


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
        if self._is_stream():
            return self._stream_problems()
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

    def build(self, split: str) -> ShardDataset | StreamDataset:
        """Indexes what is not indexed yet, then opens nothing before the first sample; streams: reads the front."""
        if split == "train" and self._is_stream():
            stream = self._stream()
            self.log_format(stream.record(0), "tar stream", len(stream))
            return stream
        if split == "val" and not self.cfg.val.ann_path:
            raise DataError(f"dataset '{self.cfg.name}': no val split; name tar files of their own in val.ann_path")
        dataset = self._dataset(self._shards(split), split)
        self.log_format(dataset.record(0), "tar shards", len(dataset))
        return dataset

    def _is_stream(self) -> bool:
        storage = self.info().storage
        return any(map(is_remote, [storage] if isinstance(storage, str) else storage))

    def _stream_problems(self) -> list[str]:
        if self.info().samples < 1:
            return ["build_info.samples: a stream cannot be counted; write about how many samples it holds"]
        if self.cfg.val.ann_path:
            expand_shards(self.cfg.val.ann_path)
        try:
            stream = self._stream()
            front = len(stream.front())
        except DataError as error:
            return [f"build_info.storage: {error}"]

        def look(index: int) -> None:
            try:
                stream.load(index, Random(0))
            except DataError as error:
                raise DataError(f"{stream.where(index)}: {error}") from None

        return self.spot_check(front, look)

    def _stream(self) -> StreamDataset:
        info = self.info()
        addresses = expand_addresses(info.storage)
        stream = StreamDataset(
            self.cfg, self.recipe({"caption": ""}, "train"), addresses, info.samples, info.shuffle_buffer
        )
        if self.cfg.format == "auto":
            stream.recipe = self.recipe(stream.record(0), "train")
        return stream

    def _shards(self, split: str) -> list[Path]:
        if split == "val":
            return expand_shards(self.cfg.val.ann_path)
        return expand_shards(self.info().storage)

    def _dataset(self, shards: list[Path], split: str) -> ShardDataset:
        dataset = ShardDataset(self.cfg, self.recipe({"caption": ""}, split), shards)
        if self.cfg.format == "auto":  # the first record tells
            dataset.recipe = self.recipe(dataset.record(0), split)
        return dataset
