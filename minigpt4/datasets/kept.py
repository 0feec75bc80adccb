"""One number per record of large annotations, found once and kept beside their index."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt4.datasets.annotations import Annotations
from minigpt4.datasets.index_files import read_indices, write_index

_LAYOUT = 1


@dataclass(frozen=True)
class Kept:
    """A place for the numbers of one content of the files and one setting."""

    source: Path
    version: dict[str, Any]
    dtype: np.dtype[Any]

    def read(self) -> tuple[NDArray[Any], dict[str, Any]] | None:
        """The numbers, and what was written with them; None where there are none."""
        for found in read_indices(self.source, self.version, self.dtype.itemsize):
            return np.fromfile(found.path, self.dtype, offset=found.start), found.head
        return None

    def write(self, numbers: NDArray[Any], **more: Any) -> None:
        """Keeps numbers, and values that JSON knows."""
        content = numbers.astype(self.dtype).tobytes()
        write_index(self.source, {**self.version, **more, "count": len(numbers)}, content)


def kept(annotations: Annotations, kind: str, settings: object, dtype: str) -> Kept | None:
    """Where the numbers of ``kind`` go, whose meaning ``settings`` decide; None for annotations that are parsed in any
    case, or of which records were left out."""
    if not (annotations.digests and annotations.is_whole):
        return None
    first, key = annotations.paths[0], hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    version = {"layout": _LAYOUT, "records": len(annotations), "content": annotations.fingerprint()}
    return Kept(first.with_name(f"{first.name}.{key}.{kind}"), version, np.dtype(dtype))
