"""Annotations that are spread over files or packed in ways of their own -> records, one per training sample."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from minigpt4.common.errors import DataError, nearest
from minigpt4.conversation.boxes import has_area_inside
from minigpt4.datasets.annotations import Annotations
from minigpt4.datasets.json_lists import stream_list

log = logging.getLogger(__name__)

_MALFORMED = (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError)
"""What a pickle that is cut off or no pickle at all raises."""
LARGEST_REGION = 16384
"""Visual Genome's regions of this many pixels and more are left out: they show most of a picture."""


def _once(reader: Callable[..., Annotations]) -> Callable[..., Annotations]:
    """``reader(files, *options)`` runs once per process as long as the files stay as they are.

    A check of the configuration and the building of its data sets follow each other: one parse serves both.
    """

    @lru_cache(maxsize=16)
    def kept(paths: tuple[Path, ...], stamps: tuple[tuple[int, int], ...], *options: Any) -> Annotations:
        del stamps  # they only tell versions of the files apart
        annotations = reader(paths, *options)
        if not len(annotations):
            raise DataError(f"{paths[0]}: holds no records for training")
        annotations.paths = list(paths)
        return annotations

    def read(paths: Sequence[Path], *options: Any) -> Annotations:
        for path in paths:
            if not path.is_file():
                siblings = [item.name for item in path.parent.glob("*")] if path.parent.is_dir() else []
                raise DataError(f"'{path}' not found{nearest(path.name, siblings)}")
        stats = [path.stat() for path in paths]
        return kept(tuple(paths), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats), *options)

    return read


@_once
def read_refs(paths: Sequence[Path], split: str) -> Annotations:
    """RefCOCO's ``refs(...).p`` (or the same as ``.json``) and ``instances.json``: one record per object of ``split``.

    A record holds ``phrase``, all sentences on the object, and ``box`` in pixels. Boxes outside their picture are left
    out.
    """
    refs_path, instances_path = paths
    refs = read_plain_pickle(refs_path) if refs_path.suffix == ".p" else _json(refs_path)
    instances = _json(instances_path)
    if not isinstance(refs, list) or not isinstance(instances, dict):
        raise DataError(f"{refs_path}: expected a list of references, and an object in {instances_path.name}")
    with _Place(f"{instances_path}"):
        boxes = {item["id"]: item["bbox"] for item in instances["annotations"]}
        sizes = {item["id"]: (item["width"], item["height"]) for item in instances["images"]}
    out = Annotations()
    out.start_group(f"{refs_path}, reference")
    left_out = 0
    for number, ref in enumerate(refs):
        with _Place(f"{refs_path}, reference {number}"):
            if ref["split"] != split:
                continue
            image_id = ref["image_id"]
            box, size = _known(boxes, ref["ann_id"], "annotation"), _known(sizes, image_id, "image")
            if not has_area_inside(box, size):
                left_out += 1
                continue
            phrases = [sentence["raw"] for sentence in ref["sentences"]]
            out.add({"id": ref["ref_id"], "image_id": image_id, "phrase": phrases, "box": box}, number)
    _tell(refs_path, left_out, "boxes outside their picture")
    return out


@_once
def read_visual_genome(paths: Sequence[Path]) -> Annotations:
    """``image_data.json`` and ``region_descriptions.json``: one record per small region with a text.

    Regions of ``LARGEST_REGION`` pixels and more, without text, or outside their picture are left out; pictures
    without regions are no mistake. The larger file is read piece by piece.
    """
    images_path, regions_path = paths
    pictures: dict[Any, tuple[str, tuple[int, int]]] = {}
    for number, item in enumerate(_items(images_path)):
        with _Place(f"{images_path}, record {number}"):
            name = "/".join(PurePosixPath(item["url"]).parts[-2:])
            pictures[_either(item, "image_id", "id")] = name, (item["width"], item["height"])
    out = Annotations()
    out.start_group(f"{regions_path}, picture")
    left_out = 0
    for number, entry in enumerate(_items(regions_path)):
        with _Place(f"{regions_path}, picture {number}"):
            for region in entry.get("regions") or ():
                box = [region[key] for key in ("x", "y", "width", "height")]
                if box[2] * box[3] >= LARGEST_REGION:
                    continue
                image_id = region.get("image_id", entry.get("id"))
                name, size = _known(pictures, image_id, "image")
                if not region["phrase"].strip() or not has_area_inside(box, size):
                    left_out += 1
                    continue
                record_id = _either(region, "region_id", "id")
                out.add(
                    {"id": record_id, "image_id": image_id, "image": name, "phrase": region["phrase"], "box": box},
                    number,
                )
    _tell(regions_path, left_out, "regions without text or outside their picture")
    return out


@_once
def read_ocrvqa(paths: Sequence[Path], split: int) -> Annotations:
    """OCR-VQA's ``dataset.json``: one record per question of books of ``split`` (1 train, 2 val, 3 test)."""
    (path,) = paths
    content = _json(path)
    if not isinstance(content, dict):
        raise DataError(f'{path}: expected {{"book id": {{"imageURL", "questions", "answers", "split"}}}}')
    out = Annotations()
    out.start_group(f"{path}, book")
    for number, (key, book) in enumerate(content.items()):
        with _Place(f"{path}, book '{key}'"):
            if book["split"] != split:
                continue
            questions, answers = book["questions"], book["answers"]
            if len(questions) != len(answers):
                raise DataError(f"{path}, book '{key}': {len(questions)} questions, but {len(answers)} answers")
            image = key + PurePosixPath(book["imageURL"]).suffix
            for question, answer in zip(questions, answers, strict=True):
                out.add({"id": key, "image": image, "question": question, "answer": answer}, number)
    return out


class _Place:
    """A field that is missing or of another kind inside the block is the file's mistake, told with its place."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError):
            raise DataError(f"{self.place}: {error} is missing") from None
        if isinstance(error, (TypeError, ValueError, AttributeError)):
            raise DataError(f"{self.place}: not of the published layout: {error}") from None


def _either(item: Mapping[str, Any], key: str, alias: str) -> Any:
    return item[key] if key in item else item[alias]


def _known(table: Mapping[Any, Any], key: Any, kind: str) -> Any:
    if key not in table:
        raise TypeError(f"{kind} {key!r} is not described")
    return table[key]


def _tell(path: Path, left_out: int, what: str) -> None:
    if left_out:
        log.info("%s: %d %s are left out", path, left_out, what)


def _json(path: Path) -> Any:
    with _reading(path):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def _items(path: Path) -> Iterator[Any]:
    """Objects of a file that holds one JSON list, one by one: such files take gigabytes as Python objects."""
    with _reading(path), path.open(encoding="utf-8-sig") as stream:
        yield from stream_list(stream)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts, text and numbers. A pickle can name any function to call; none is looked up here."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"the pickle asks for '{module}.{name}'; lists, dicts, text and numbers are allowed alone")


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle that holds nothing but plain containers, text and numbers, written by Python 2 or 3.

    Raises DataError for one that asks for anything else; nothing of it is executed.
    """
    stream: BinaryIO
    with path.open("rb") as stream:
        try:
            return _PlainUnpickler(stream, encoding="utf-8").load()
        except DataError as error:
            raise DataError(
                f"{path}: {error}; a list of references as JSON under the same name with .json works too"
            ) from None
        except _MALFORMED as error:
            raise DataError(f"{path}: not a readable pickle: {error}") from None
