"""``ann_path`` -> records, whatever it names: text files, tables, or a folder of tables or of classes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from minigpt4.common.errors import DataError
from minigpt4.datasets.annotations import TABLE_SUFFIXES, Annotations, check_file, joined, read_annotations
from minigpt4.datasets.tables import SAVED, read_table, saved_tables

log = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test")


def check_source(path: Path) -> None:
    """Raises DataError when ``path`` is neither a folder nor an annotation file by name."""
    if not path.is_dir():
        check_file(path)


def read_sources(paths: Sequence[Path], sections: Sequence[str] | None = None) -> Annotations:
    """All records of ``paths`` in order; ``sections`` as in ``read_annotations``. Raises DataError."""
    if sections is not None:
        return read_annotations(paths, sections)
    folders = [path for path in paths if path.is_dir()]
    parts = [_read(path) for path in paths]
    if len(parts) > 1 and any(part.root for part in parts):
        raise DataError(f"'{folders[0]}' holds one folder per class: it is read alone, as a data set of its own")
    return joined(parts)


def _read(path: Path) -> Annotations:
    check_source(path)
    if not path.is_dir():
        return read_table(path) if path.suffix.lower() in TABLE_SUFFIXES else read_annotations([path])
    tables = _tables(path)
    return joined([read_table(table) for table in tables]) if tables else read_class_folders(path)


def _tables(folder: Path) -> list[Path]:
    """Table files of a folder: those ``save_to_disk`` wrote, else those in it. Raises DataError for mixed splits."""
    if any((folder / name).is_file() for name in SAVED):
        return saved_tables(folder)
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES)
    splits = sorted({path.stem.partition("-")[0] for path in found} & set(_SPLITS))
    if len(splits) > 1:
        raise DataError(f"'{folder}' holds files of several splits ({', '.join(splits)}); list those to train on")
    return found


def read_class_folders(root: Path) -> Annotations:
    """One record per picture below ``root``: ``image``, its path, and ``label``, the name of its folder.

    Underscores of a folder's name become spaces. Folders deeper down belong to the class they lie in. Raises DataError
    for a class without pictures, and for folders named like splits.
    """
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        kinds = "a sub-folder per class, Parquet files, or what save_to_disk wrote"
        raise DataError(f"'{root}' is a folder without annotations; expected {kinds}")
    splits = [path.name for path in classes if path.name.lower() in _SPLITS]
    if splits:
        wanted = f"ann_path: {root / splits[0]}"
        raise DataError(f"'{root}' holds the folder '{splits[0]}', which is a split and no class; write {wanted}")
    return _class_records(root, tuple((path, path.stat().st_mtime_ns) for path in classes))


@lru_cache(maxsize=16)
def _class_records(root: Path, classes: tuple[tuple[Path, int], ...]) -> Annotations:
    out = Annotations()
    out.paths, out.root, out.shape = [root], root, "class folders"
    digest, others = hashlib.sha256(), sum(item.is_file() for item in root.iterdir())
    for folder, _ in classes:
        out.start_group(f"{folder}, picture", folder.name)
        number = 0
        for path in _files(folder):
            if path.suffix.lower() not in PICTURES:
                others += 1
                continue
            name = path.relative_to(root).as_posix()
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            out.add({"image": name, "label": folder.name.replace("_", " ").strip()}, number)
            number += 1
        if not number:
            raise DataError(f"'{folder}' holds no pictures ({', '.join(PICTURES)}); every folder is a class")
    out.listing = digest.hexdigest()
    if others:
        log.info("%s: %d files are no pictures inside a class, left out", root, others)
    return out


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder in a fixed order, without hidden ones."""
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(current, name) for name in sorted(names) if not name.startswith("."))
