"""Which pictures data sets show, and their features in the place of pixels."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from minigpt4.common.errors import DataError
from minigpt4.datasets.feature_cache import Rows
from minigpt4.datasets.map_dataset import MapDataset
from minigpt4.datasets.pictures import HeldImage, ImageSource, open_encoded, open_image, source_key
from minigpt4.processors.base import ImageProcessor


class CachedPictures:
    """Features of a data set's pictures by the number of the sample; stands in ``MapDataset.features``."""

    def __init__(self, rows: Rows, starts: Sequence[int], places: Sequence[int], failures: Mapping[int, str]) -> None:
        """Sample i shows ``places[starts[i] : starts[i + 1]]``, unless ``failures`` says why it cannot."""
        self._rows, self._starts, self._places, self._failures = rows, starts, places, failures

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Features [P, C'] of every picture of a sample. Raises DataError where one could not be read."""
        if index in self._failures:
            raise DataError(self._failures[index])
        return tuple(self._rows(place) for place in self._places[self._starts[index] : self._starts[index + 1]])


@dataclass(frozen=True)
class Picture:
    """A place, its key, what makes pixels of what is there, and what this preparation is called.

    is_fast: the processor takes pictures that are not decoded.
    """

    source: ImageSource
    key: bytes
    processor: ImageProcessor
    preparation: str
    is_fast: bool = False

    def pixels(self, content: bytes) -> Tensor:
        """The encoded picture as [3, S, S]. Raises DataError that names it."""
        held = HeldImage(content, str(self.source))
        return self.processor(open_encoded(held) if self.is_fast else open_image(held))


def preparation(dataset: MapDataset) -> str:
    """Equal for data sets that make equal pixels of every picture."""
    identity, backend = dataset.recipe.vision.identity(), dataset.cfg.image_backend
    return identity if backend == "exact" else f"{identity} {backend}"


@dataclass
class Shown:
    """What the samples of one data set show: numbers into ``Wanted.pictures``; see CachedPictures."""

    starts: array[int] = field(default_factory=lambda: array("q", [0]))
    numbers: array[int] = field(default_factory=lambda: array("q"))
    failures: dict[int, str] = field(default_factory=dict)


class Wanted:
    """Every picture of some data sets, each place and preparation once."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self._numbers: dict[tuple[str, bytes], int] = {}

    def _add(self, source: ImageSource, processor: ImageProcessor, identity: str, is_fast: bool = False) -> int:
        """Number of a picture in ``pictures``. Raises DataError for a file that is not there."""
        key = source_key(source)
        number = self._numbers.setdefault((identity, key), len(self.pictures))
        if number == len(self.pictures):
            self.pictures.append(Picture(source, key, processor, identity, is_fast))
        return number

    def add_dataset(self, dataset: MapDataset) -> Shown:
        """What the samples show, in order. Raises DataError with the place, unless ``on_error`` is skip."""
        shown, processor, identity = Shown(), dataset.recipe.vision, preparation(dataset)
        is_fast = dataset.cfg.image_backend != "exact"
        for index in range(len(dataset)):
            try:
                numbers = [self._add(source, processor, identity, is_fast) for source in dataset.sources(index)]
            except DataError as error:
                if dataset.cfg.on_error == "raise":
                    raise DataError(f"dataset '{dataset.name}', {dataset.where(index)}: {error}") from error
                shown.failures[index] = str(error)
                numbers = []
            shown.numbers.extend(numbers)
            shown.starts.append(len(shown.numbers))
        return shown

    def add_files(self, paths: Iterable[str], processor: ImageProcessor) -> dict[str, int]:
        """Pictures outside of data sets, by path."""
        return {path: self._add(Path(path), processor, processor.identity()) for path in paths}


def attach(dataset: MapDataset, shown: Shown, rows: Rows, places: Sequence[int], messages: Mapping[int, str]) -> None:
    """Give a data set its features. places: of every wanted picture; messages: why some have none.

    Raises DataError for a picture that could not be read, unless ``on_error`` is skip.
    """
    failures = dict(shown.failures)
    for index in range(len(dataset)) if messages else ():
        numbers = shown.numbers[shown.starts[index] : shown.starts[index + 1]]
        message = next((messages[number] for number in numbers if number in messages), None)
        if message is not None:
            failures[index] = message
            if dataset.cfg.on_error == "raise":
                raise DataError(f"dataset '{dataset.name}', {dataset.where(index)}: {message}")
    own = array("q", (places[number] for number in shown.numbers))
    dataset.features = CachedPictures(rows, shown.starts, own, failures)
