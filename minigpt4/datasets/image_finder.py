"""Where the files of a record's pictures are, by the record's own names or by patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minigpt4.common.errors import DataError
from minigpt4.datasets.annotations import Record
from minigpt4.datasets.pictures import ImageSource
from minigpt4.datasets.stored import StoredImage

_SHOWN = 8
"""Names that a message lists of those that were tried."""


class _Name(NamedTuple):
    """Where a picture may be, and the pattern that says so."""

    name: str | StoredImage
    pattern: str


@dataclass(frozen=True)
class ImageFinder:
    """Files of a record's pictures below ``root``.

    ``names``: patterns with fields of the record in braces, ``COCO_train2014_{id}.jpg``; the first that exists wins.
    Without patterns the record's own ``images`` or ``image`` counts.
    """

    root: Path | None
    names: tuple[str, ...] = ()

    def named(self, record: Record) -> Record:
        """``record`` with ``images``: one name per picture, the most likely one; an empty list for none."""
        return {**record, "images": [names[0].name for names in self._candidates(record)]}

    def find(self, record: Record) -> list[ImageSource]:
        """Existing files, in order; pictures inside tables as they are. Raises DataError that names what was tried."""
        return [path for path, _ in self.located(record)]

    def located(self, record: Record) -> list[tuple[Path | StoredImage, str]]:
        """Like ``find``, each with the pattern of ``names`` that found it; "" for a name of the record's own."""
        return [self._existing(names) for names in self._candidates(record)]

    def _existing(self, names: Sequence[_Name]) -> tuple[Path | StoredImage, str]:
        if self.root is None and not isinstance(names[0].name, StoredImage):
            raise DataError("build_info.image_path is not set, but the record has an image")
        for name, pattern in names:
            if isinstance(name, StoredImage):
                return name, pattern
            path = Path(self.root or "", name)
            if path.is_file():
                return path, pattern
        others = ", ".join(str(item.name) for item in names[1:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        tried = f" (also tried: {others}{more})" if others else ""
        raise DataError(f"image '{names[0].name}' not found in '{self.root}'{tried}")

    def _candidates(self, record: Record) -> Sequence[Sequence[_Name]]:
        field, own = "images", record.get("images")
        if not own:
            field, own = "image", [record.get("image")]
        if not isinstance(own, list) or not all(isinstance(name, (str, StoredImage)) or name is None for name in own):
            shown = own[0] if field == "image" else own
            raise DataError(f"field '{field}' holds {shown!r}, expected a file name{'s' if field == 'images' else ''}")
        own = [name for name in own if name]
        if not self.names:
            return [[_Name(name, "")] for name in own]
        found = (
            [_Name(name, "")] if isinstance(name, StoredImage) else self._patterned(record, name)
            for name in own or [None]
        )
        return [names for names in found if names]

    def _patterned(self, record: Record, image: str | None) -> list[_Name]:
        own = {"image": image, "basename": image.rpartition("/")[2] if image else None}
        known = {key: value for key, value in {**record, **own}.items() if value not in (None, "")}
        usable = [_Name(name, pattern) for pattern in self.names if (name := _rendered(pattern, known))]
        if not usable and image:
            patterns = ", ".join(self.names)
            raise DataError(f"none of the patterns {patterns} fits the fields {', '.join(map(str, known))}")
        return usable


def _rendered(pattern: str, record: Record) -> str:
    try:
        return pattern.format_map(record)
    except (KeyError, ValueError, IndexError, AttributeError):  # a field this record does not have
        return ""
