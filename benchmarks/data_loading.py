"""Pictures per second and core, and what many records cost: time to start, resident memory.

    python benchmarks/data_loading.py                        gated, about 5 CPU-minutes, 1 GB of temporary files
    python benchmarks/data_loading.py --quick --json out.json

Pictures: a photograph of scikit-image at 1024 x 1024 as JPEG, to 224 and 448 pixels, exact (Pillow), fast
(torchvision) and decoded before (``run.cache_images``), from files and from an indexed tar shard, in turns; single
process, one thread, from the page cache.
Records: shards, a JSON list and JSON lines of 10k, 100k and 1M records, each opened by a process of its own: the JSON
twice, the first start makes the index of a large file and the second one, which is gated, finds it. Shards are one tar
of 10k records, indexed once, and links to it and its index. Memory is what the resident set grows by while the data set
is built, after one of one record, and after 1,000 random records were read too.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.shared import in_process, parser, write_json  # noqa: E402

SIDES = (224, 448)
WAYS = ("exact", "fast", "cached")
"""image_backend, and exact pixels from the picture cache (``run.cache_images``), filled before."""
PICTURES, PER_SHARD = 40, 10_000
GATES = {"fast_ratio": 2.0, "start_s": 5.0, "bytes_per_record": 100.0, "bytes_after_reading": 100.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 1 when a gate is missed in the gated mode."""
    options = parser(__doc__, "2 rounds, records up to 100k, ungated")
    options.add_argument("--rounds", type=int, default=5, help="alternating rounds over the pictures (default 5)")
    options.add_argument("--records-only", action="store_true", help="leave the pictures out")
    options.add_argument("--pictures-only", action="store_true", help="leave the records out")
    options.add_argument("--worker", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.worker:
        print(json.dumps(open_records(given.worker[0], Path(given.worker[1]))))
        return 0
    sizes: tuple[int, ...] = (10_000, 100_000) if given.quick else (10_000, 100_000, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        rounds = 2 if given.quick else given.rounds
        figures: dict[str, Any] = {"pictures": [] if given.records_only else time_pictures(Path(folder), rounds)}
        sizes = () if given.pictures_only else sizes
        figures["records"] = [row for size in sizes for row in time_records(Path(folder), size)]
    write_json(given.json, figures)
    report(figures)
    missed = misses(figures)
    for line in missed:
        print(f"gate missed: {line}")
    return 1 if missed and not given.quick else 0


def photograph(number: int) -> bytes:
    """A photograph at 1024 x 1024 as JPEG; a number of its own keeps files apart."""
    from PIL import Image
    from skimage import data

    pixels: Any = data.astronaut()
    stream = io.BytesIO()
    picture = Image.fromarray(pixels).resize((1024, 1024), Image.Resampling.BICUBIC)
    picture.save(stream, "JPEG", quality=90, comment=str(number))
    return stream.getvalue()


def make_dataset(block: dict[str, Any], side: int) -> Any:
    """The data set of a YAML block."""
    from omegaconf import OmegaConf

    from minigpt4 import catalog
    from minigpt4.common.registry import registry
    from minigpt4.processors.base import ImageSpec

    catalog.load()
    cls = registry.get("builder", block.get("builder", "annotations"))
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls.Config), block, {"name": "bench"}))
    return cls(cfg, ImageSpec(side)).build("train")


def time_pictures(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Pictures per CPU-second of each way, medians over alternating rounds."""
    import torch

    torch.set_num_threads(1)
    root = folder / "pictures"
    root.mkdir()
    contents = {f"{number:04d}": photograph(number) for number in range(PICTURES)}
    for key, content in contents.items():
        (root / f"{key}.jpg").write_bytes(content)
    records = [{"image": f"{key}.jpg", "caption": "a person"} for key in contents]
    (root / "records.json").write_text(json.dumps(records))
    write_tar(root / "0.tar", ((key, content) for key, content in contents.items()))
    sources: dict[str, dict[str, Any]] = {
        "files": {"format": "caption", "build_info": {"ann_path": f"{root}/records.json", "image_path": str(root)}},
        "shards": {"builder": "shards", "build_info": {"storage": f"{root}/0.tar"}},
    }
    ways = [(side, source, way) for side in SIDES for source in sources for way in WAYS]
    sets = {way: opened(sources[way[1]], *way[::2], folder / "cache") for way in ways}
    rates: dict[Any, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways if number % 2 else ways[::-1]:
            begun = time.process_time()
            for index in range(PICTURES):
                sets[way].sample(0, index, 1)
            if number:  # the first round warms up
                rates[way].append(PICTURES / (time.process_time() - begun))
    rows = []
    for side, source, backend in ways:
        rate = statistics.median(rates[side, source, backend])
        ratio = rate / statistics.median(rates[side, source, "exact"])
        gap = difference(sets[side, source, "exact"], sets[side, source, backend])
        rows.append({"side": side, "source": source, "backend": backend, "per_s": rate, "ratio": ratio, "levels": gap})
    return rows


def opened(block: dict[str, Any], side: int, way: str, cache: Path) -> Any:
    """The data set of a YAML block that reads pictures one of the ways."""
    from minigpt4.datasets.picture_cache import PictureCache

    if way != "cached":
        return make_dataset({**block, "image_backend": way}, side)
    dataset = make_dataset(block, side)
    dataset.picture_cache = PictureCache(cache, dataset)
    for index in range(len(dataset)):
        dataset.sample(0, index, 1)
    dataset.picture_cache.close()
    return dataset


def difference(exact: Any, other: Any) -> float:
    """Largest difference of a picture, in levels of 256."""
    import torch

    from minigpt4.common.types import as_floats
    from minigpt4.processors.base import CLIP_STD

    gap = (as_floats(exact.sample(0, 0, 1).images[0]) - as_floats(other.sample(0, 0, 1).images[0])).abs()
    return float((gap * torch.tensor(CLIP_STD).view(3, 1, 1)).max() * 255)


def write_tar(path: Path, members: Any) -> None:
    """A shard of pictures with a caption each."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, content in members:
            for ending, value in (("jpg", content), ("txt", b"a red bus near a pier")):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
            tar.members = []  # type: ignore[attr-defined]


def link_shards(folder: Path, size: int) -> tuple[Path, float]:
    """A folder of shards with ``size`` records, indexed, and the seconds that indexing one record takes."""
    from minigpt4.datasets.shards import index_shard

    per_shard = min(size, PER_SHARD)
    first = folder / f"shard_{per_shard}.tar"
    if not first.exists():  # pictures are tiny: nothing of them is read at the start
        write_tar(first, ((f"{number:09d}", b"jpeg") for number in range(per_shard)))
    begun = time.perf_counter()
    index = index_shard(first)
    seconds = (time.perf_counter() - begun) / index.count
    shards = folder / f"shards_{size}"
    shards.mkdir()
    for number in range(size // per_shard):
        os.link(first, shards / f"{number:05d}.tar")
        os.link(index.path, shards / f".{number:05d}.tar.index")
    return shards, seconds


def write_annotations(path: Path, size: int) -> Path:
    """``size`` records of two turns, about 370 bytes each, as a list or, under a name with .jsonl, as lines."""
    opened, between, closed = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[", ",\n", "]")
    with path.open("w") as stream:
        for number in range(size):
            turns = [
                {"from": "human", "value": "<image>\nDescribe the face."},
                {"from": "gpt", "value": "A woman with a calm look. " * 8},
            ]
            record = {"id": f"{number:09d}", "image": f"coco/{number:09d}.jpg", "conversations": turns}
            stream.write((between if number else opened) + json.dumps(record))
        stream.write(closed)
    return path


def time_records(folder: Path, size: int) -> list[dict[str, Any]]:
    """Starts over ``size`` records, in processes of their own."""
    print(f"{size:,} records ...", file=sys.stderr, flush=True)
    shards, index_s = link_shards(folder, size)
    rows = [{"kind": "shards", "records": size, **in_process(__file__, "--worker", "shards", str(shards))}]
    if size == PER_SHARD:  # only the first one was not indexed yet
        rows[0]["index_us"] = index_s * 1e6
    for kind, ending in (("json list", "json"), ("json lines", "jsonl")):
        annotations = write_annotations(folder / f"records_{size}.{ending}", size)
        first = in_process(__file__, "--worker", "annotations", str(annotations))
        is_indexed = annotations.with_name(f".{annotations.name}.index").exists()
        later = in_process(__file__, "--worker", "annotations", str(annotations))
        if first["content"] != later["content"]:
            raise SystemExit(f"{annotations.name}: the second start read other records than the first")
        rows.append({"kind": kind, "records": size, "first_s": first["start_s"], "indexed": is_indexed, **later})
        annotations.unlink()
    return rows


def open_records(kind: str, path: Path) -> dict[str, Any]:
    """Seconds until the data set is built, bytes it keeps per record, then and after 1,000 records at random.

    Also microseconds per record, and a hash of the records and of what the data set says of its content.
    """
    block: dict[str, Any] = {"format": "conversation", "build_info": {"ann_path": str(path), "image_path": "."}}
    if kind == "shards":
        block = {"builder": "shards", "build_info": {"storage": str(path)}}
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "one.json"
        small.write_text('[{"id": "1", "image": "1.jpg", "conversations": []}]')
        write_tar(Path(folder) / "one.tar", [("1", b"jpeg")])
        key, value = ("storage", f"{folder}/one.tar") if kind == "shards" else ("ann_path", str(small))
        keep = make_dataset({**block, "format": "caption", "build_info": {**block["build_info"], key: value}}, 224)
    before = resident()
    begun = time.perf_counter()
    dataset = make_dataset(block, 224)
    seconds = time.perf_counter() - begun
    grown = resident() - before
    rng, content = Random(0), hashlib.sha256(dataset.fingerprint().encode())
    begun = time.perf_counter()
    for _ in range(1000):
        content.update(repr(dataset.record(rng.randrange(len(dataset)))).encode())
    each = (time.perf_counter() - begun) * 1000
    grown_later = resident() - before
    del keep
    return {
        "start_s": seconds,
        "bytes_per_record": grown / len(dataset),
        "bytes_after_reading": grown_later / len(dataset),
        "record_us": each,
        "content": content.hexdigest(),
    }


def resident() -> int:
    """Bytes of this process in memory now."""
    import gc

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def misses(figures: dict[str, Any]) -> list[str]:
    """Gates that the figures miss; those on records are for 1M of them, whatever holds them."""
    found = []
    for row in figures["pictures"]:
        if row["backend"] == "fast" and row["ratio"] < GATES["fast_ratio"]:
            found.append(f"fast {row['ratio']:.2f} < {GATES['fast_ratio']} ({row['side']} px from {row['source']})")
    for row in figures["records"]:
        for key in ("start_s", "bytes_per_record", "bytes_after_reading"):
            if row["records"] >= 1_000_000 and row[key] > GATES[key]:
                found.append(f"{key} {row[key]:.1f} > {GATES[key]} ({row['records']:,} records in {row['kind']})")
    return found


def report(figures: dict[str, Any]) -> None:
    """The figures as lines."""
    for row in figures["pictures"]:
        way = f"{row['side']} px, {row['source']}, {row['backend']}"
        print(f"{way:<24} {row['per_s']:7.1f} pictures/CPU-s  x{row['ratio']:.2f}  {row['levels']:.1f} levels off")
    for row in figures["records"]:
        print(
            f"{row['records']:>9,} records, {row['kind']:<10} start {row['start_s']:6.2f} s, "
            f"{row['bytes_per_record']:7.1f} B each, {row['bytes_after_reading']:7.1f} B after reading 1,000, "
            f"{row['record_us']:5.0f} us to read one"
        )
        if "first_s" in row:
            kind = "making the index" if row["indexed"] else "too small for an index"
            print(f"{'':>10}the first start: {row['first_s']:.2f} s, {kind}")
        if "index_us" in row:
            print(f"{'':>10}indexing a shard for the first time: {row['index_us']:.0f} us per record")


if __name__ == "__main__":
    sys.exit(main())
