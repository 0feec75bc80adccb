"""Parquet and Arrow tables -> records: one per row, pictures left where they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from minigpt4.common.errors import DataError, nearest
from minigpt4.datasets.annotations import Annotations
from minigpt4.datasets.stored import StoredImage, arrow, open_arrow, open_parquet

_ROWS = 1024
SAVED = ("state.json", "dataset_dict.json")
"""One of these lies in a folder that ``save_to_disk`` of Hugging Face's ``datasets`` wrote."""


def read_table(path: Path) -> Annotations:
    """Rows of one ``.parquet`` or ``.arrow`` file; columns of picture bytes become StoredImage.

    Numbers of a ClassLabel column become its names. Parsed once per process as long as the file does not change.
    """
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _read(path: Path, size: int, mtime_ns: int) -> Annotations:
    del size, mtime_ns  # they only tell versions of the file apart
    out = Annotations()
    out.paths = [path]
    out.shape = "parquet table" if path.suffix.lower() == ".parquet" else "arrow table"
    out.start_group(f"{path}, row")
    pa = arrow(path)
    try:
        schema, batches = _opened(path)
        pictures = {name for name in schema.names if _holds_bytes(schema.field(name).type, pa)}
        names = _class_names(schema)
        row = 0
        for batch in batches:
            for record in _records(batch, schema.names, pictures, row, str(path), names):
                out.add(record, row)
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not len(out):
        raise DataError(f"{path}: holds no records")
    return out


def _opened(path: Path) -> tuple[Any, Iterator[Any]]:
    """Schema, and batches of rows without the bytes of pictures."""
    if path.suffix.lower() == ".arrow":
        table = open_arrow(str(path))
        return table.schema, iter(table.to_batches(max_chunksize=_ROWS))
    file, pa = open_parquet(str(path)), arrow(path)
    schema = file.schema_arrow
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    left_out = {name for name in schema.names if _holds_bytes(schema.field(name).type, pa) == "cell"}
    kept = [leaf for leaf in leaves if leaf not in left_out and not _is_bytes_leaf(leaf, schema, pa)]
    return schema, file.iter_batches(batch_size=_ROWS, columns=kept, use_threads=False)


def _is_bytes_leaf(leaf: str, schema: Any, pa: Any) -> bool:
    """Whether a leaf holds a picture beside its path; a list without paths is read whole, to know its lengths."""
    name, _, inner = leaf.partition(".")
    if not inner.endswith("bytes") or name not in schema.names:
        return False
    kind = schema.field(name).type
    item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    is_alone = pa.types.is_struct(item) and item.get_field_index("path") < 0
    return bool(_holds_bytes(kind, pa)) and not (is_alone and item is not kind)


def _holds_bytes(kind: Any, pa: Any) -> str:
    """'cell' for a column of bytes, 'struct' for {bytes, path}, 'list' for lists of these, '' for anything else."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "cell"
    if pa.types.is_struct(kind):
        number = kind.get_field_index("bytes")
        return "struct" if number >= 0 and _holds_bytes(kind.field(number).type, pa) == "cell" else ""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list" if _holds_bytes(kind.value_type, pa) else ""
    return ""


def _records(
    batch: Any, columns: Sequence[str], pictures: set[str], first: int, file: str, names: dict[str, list[str]]
) -> Iterator[dict[str, Any]]:
    values: dict[str, list[Any]] = {}
    for column in columns:
        number = batch.schema.get_field_index(column)
        if column in pictures:
            found = [""] * batch.num_rows if number < 0 else _old_names(batch.column(number))
            values[column] = [_stored(file, column, first + row, name) for row, name in enumerate(found)]
        else:
            values[column] = batch.column(number).to_pylist()
    for column, known in names.items():
        values[column] = [_class_name(known, value, f"{file}, column '{column}'") for value in values[column]]
    return (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))


def _old_names(array: Any) -> list[Any]:
    """Per row: the name a picture had, '' for a picture without one, None for no picture; lists of these for lists."""
    pa = arrow("")
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        inner = iter(_old_names(array.flatten()))
        lengths = array.value_lengths().to_pylist()
        return [None if length is None else [next(inner) for _ in range(length)] for length in lengths]
    valid = array.is_valid().to_pylist()
    if not pa.types.is_struct(array.type) or array.type.get_field_index("path") < 0:
        return ["" if is_valid else None for is_valid in valid]
    paths = array.field("path").to_pylist()
    return [(path or "") if is_valid else None for path, is_valid in zip(paths, valid, strict=True)]


def _stored(file: str, column: str, row: int, name: Any) -> Any:
    if isinstance(name, list):
        return [StoredImage(file, column, row, place, inner or "") for place, inner in enumerate(name)]
    return None if name is None else StoredImage(file, column, row, name=name)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Columns whose numbers stand for names, as ``datasets`` describes them in the schema."""
    described = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(described).get("info", {}).get("features", {}) if described else {}
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if column in schema.names and isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _class_name(known: Sequence[str], value: Any, place: str) -> Any:
    if value is None or value == -1:  # datasets writes -1 where a label is not known
        return None
    if not 0 <= value < len(known):
        raise DataError(f"{place}: holds {value}, but there are {len(known)} class names")
    return known[value]


def saved_tables(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``save_to_disk`` wrote; of several splits that of training.

    Raises DataError with the splits when none is called train, and for files that are missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _described(folder / "dataset_dict.json").get("splits", [])
        if "train" not in splits:
            raise DataError(f"{folder}: holds the splits {', '.join(splits)}; name one: ann_path: {folder}/{splits[0]}")
        return saved_tables(folder / "train")
    state = _described(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: was saved with an index beside its rows; save it after flatten_indices()")
    files = [folder / item["filename"] for item in state.get("_data_files") or []]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        there = [path.name for path in folder.glob("*.arrow")]
        raise DataError(f"{folder}: '{''.join(missing[:1])}' of state.json not found{nearest(str(missing), there)}")
    return files


def _described(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object, as save_to_disk writes it")
    return content
