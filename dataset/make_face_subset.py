"""Picks the records about faces out of a ShareGPT4V annotation file (a JSON list of LLaVA-style records).

Both gates, a caption that speaks of a person and a face, and a face found in the picture:

    python dataset/make_face_subset.py sharegpt4v_instruct_gpt4-vision_cap100k.json --images Images \\
        --out subset_objects_gpt4vision_100k.json

The caption gate alone needs no picture:

    python dataset/make_face_subset.py sharegpt4v_instruct_gpt4-vision_cap100k.json --keep caption --out faces.json

Second captions for the same pictures, chosen by the paths of a subset that exists:

    python dataset/make_face_subset.py share-captioner_coco_lcs_sam_1246k_1107.json \\
        --keys-from subset_objects_gpt4vision_100k.json \\
        --out subset_objects_share-captioner_coco_lcs_sam_1246k_1107.json

How two files overlap, printed and written as JSON:

    python dataset/make_face_subset.py --overlap subset_A.json subset_B.json --out overlap.json

Records are copied character by character, in their order. OUT.stats.json says how they were chosen. A run that was
stopped goes on where it was: what the detector saw is kept in OUT.detections.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import subset_overlap as so
from face_gates import DEFAULT_WORDS, CaptionGate, DetectionCache, FaceRule, detect_all, load_detector, read_words
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from minigpt4.common.errors import DataError, MiniGPT4Error
from minigpt4.common.files import open_atomically, write_atomically

KEEP = ("both", "either", "caption", "detector")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Images:
    """Where pictures lie: folders by the first components of their path, else below ``root``."""

    root: Path | None
    prefixes: Mapping[str, Path]

    def find(self, key: str) -> Path | None:
        """The file of a picture; the extra archives of ShareGPT4V unpack below 'data/'."""
        for prefix, folder in self.prefixes.items():
            if key.startswith(prefix + "/"):
                path = folder / key.removeprefix(prefix + "/")
                return path if path.is_file() else None
        if self.root is None:
            return None
        return next((path for path in (self.root / key, self.root / "data" / key) if path.is_file()), None)


class Verdict(NamedTuple):
    """Why a record is left out ('' = kept), and what the detector saw: faces, area share of the largest."""

    reason: str
    faces: int = 0
    share: float = 0.0


@dataclass
class Tally:
    """Counts of one run."""

    entries: int = 0
    kept: int = 0
    kept_keys: set[str] = field(default_factory=set)
    prefixes: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    gates: Counter[tuple[str, str]] = field(default_factory=Counter)  # (caption, detector): passed | failed | not run
    faces: Counter[int] = field(default_factory=Counter)
    shares: list[float] = field(default_factory=list)

    def add(self, key: str, verdict: Verdict, example: str) -> None:
        """Counts one record."""
        reason = verdict.reason
        self.entries += 1
        row = self.prefixes.setdefault(so.prefix_of(key), Counter())
        row["entries"] += 1
        if reason:
            found = self.reasons.setdefault(reason, {"count": 0, "example": example})
            found["count"] += 1
        else:
            self.kept += 1
            self.kept_keys.add(key)
            row["kept"] += 1
            if verdict.faces:
                self.faces[verdict.faces] += 1
                self.shares.append(verdict.share)

    def as_dict(self) -> dict[str, Any]:
        """For the statistics file."""
        shares = sorted(self.shares)
        return {
            "entries": self.entries,
            "kept": self.kept,
            "kept distinct paths": len(self.kept_keys),
            "rejected": {name: self.reasons[name] for name in sorted(self.reasons)},
            "gates": [
                {"caption": caption, "detector": detector, "entries": count}
                for (caption, detector), count in sorted(self.gates.items())
            ],
            "per prefix": {
                name: {"entries": row["entries"], "kept": row["kept"]} for name, row in sorted(self.prefixes.items())
            },
            "kept by number of faces": {str(number): self.faces[number] for number in sorted(self.faces)},
            "median area share of the largest face": shares[len(shares) // 2] if shares else None,
        }


@dataclass(frozen=True)
class Chooser:
    """Decides about one record."""

    keep: str
    caption: CaptionGate
    images: Images
    rule: FaceRule
    cache: DetectionCache | None
    keys: frozenset[str] | None = None
    is_lazy: bool = False

    def caption_reason(self, record: Mapping[str, Any]) -> str:
        """Empty when the answers pass the caption gate."""
        turns = record.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return "no conversations"
        return self.caption(" ".join(str(turn.get("value", "")) for turn in turns if turn.get("from") == "gpt"))

    def needs_look(self, record: Mapping[str, Any]) -> bool:
        """Whether the detector must see the picture; a lazy run leaves out what the caption has decided."""
        if self.cache is None:
            return False
        if not self.is_lazy or self.keep == "detector":
            return True
        return (self.caption_reason(record) == "") == (self.keep == "both")

    def __call__(self, record: Mapping[str, Any], tally: Tally) -> Verdict:
        """Keeps the record or leaves it out; ``tally`` counts what each gate said."""
        key = so.key_of(record)
        if self.keys is not None:
            return Verdict("" if key in self.keys else "its picture is not in --keys-from")
        caption = self.caption_reason(record)
        if self.cache is None:
            tally.gates[_word(caption), NOT_RUN] += 1
            return Verdict(caption)
        look = self._look(key) if self.needs_look(record) else Verdict(NOT_RUN)
        tally.gates[_word(caption), _word(look.reason)] += 1
        if self.keep == "both":
            return look._replace(reason=caption or look.reason)
        return look if self.keep == "detector" else look._replace(reason=caption and look.reason)

    def _look(self, key: str) -> Verdict:
        """The detector gate's verdict."""
        assert self.cache is not None
        if not key:
            return Verdict("record without a picture")
        path = self.images.find(key)
        if path is None:
            return Verdict("picture not found")
        seen = self.cache.get(path)
        assert seen is not None, path
        if seen.error:
            return Verdict("picture cannot be read")
        faces = self.rule.faces(seen)
        if not faces:
            return Verdict("detector: faces too small or too unsure" if seen.faces else "detector: no face")
        return Verdict("", len(faces), seen.largest_share(faces))


def _word(reason: str) -> str:
    return NOT_RUN if reason == NOT_RUN else "failed" if reason else "passed"


def unique_paths(source: Path, chooser: Chooser) -> Iterator[Path]:
    """Pictures the detector must see, each once."""
    seen = set()
    for record, _ in so.read_records(source):
        key = so.key_of(record)
        if key and key not in seen and chooser.needs_look(record):
            seen.add(key)
            path = chooser.images.find(key)
            if path is not None:
                yield path


def look_at_pictures(source: Path, chooser: Chooser, detector: Any, threads: int, console: Console) -> int:
    """Runs the detector over all pictures with a progress bar. Returns how many there are."""
    assert chooser.cache is not None
    console.print("counting pictures ...", highlight=False)
    paths = dict.fromkeys(unique_paths(source, chooser))
    known = sum(chooser.cache.get(path) is not None for path in paths)
    if known:
        console.print(f"{known:,} of {len(paths):,} pictures were seen in an earlier run", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("looking for faces", total=len(paths), completed=known, rate="")
        started, done = time.perf_counter(), 0
        fresh = (path for path in paths if chooser.cache.get(path) is None)
        for _ in detect_all(fresh, detector, chooser.cache, threads):
            done += 1
            rate = done / max(1e-9, time.perf_counter() - started)
            progress.update(task, completed=known + done, rate=f"{rate:.1f} pictures/s")
    return len(paths)


def write_subset(source: Path, out: Path, chooser: Chooser, is_deduped: bool) -> Tally:
    """Copies the chosen records' own characters. Raises DataError when none is chosen."""
    tally, questions = Tally(), set[int]()
    with open_atomically(out) as file:
        for number, (record, text) in enumerate(so.read_records(source)):
            key, verdict = so.key_of(record), chooser(record, tally)
            if not verdict.reason and is_deduped:
                mark = hash((key, _question(record)))
                if mark in questions:
                    verdict = Verdict("the same picture and question again")
                questions.add(mark)
            tally.add(key, verdict, f"record {number}, {key or 'no picture'}")
            if not verdict.reason:
                file.write(("[\n" if tally.kept == 1 else ",\n") + text)
        if not tally.kept:
            reasons = sorted((-found["count"], name) for name, found in tally.reasons.items())
            why = f"; most often: {reasons[0][1]}" if reasons else ""
            raise DataError(f"{source}: none of {tally.entries} records is kept{why}")
        file.write("\n]\n")
    return tally


def _question(record: Mapping[str, Any]) -> str:
    turns = record.get("conversations")
    return str(turns[0].get("value")) if isinstance(turns, list) and turns and isinstance(turns[0], dict) else ""


def describe_file(path: Path) -> dict[str, Any]:
    """Name, bytes and SHA-256."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def make_subset(args: argparse.Namespace, console: Console) -> None:
    """The whole way from a file to its subset and statistics."""
    source, out = args.source, args.out
    gate = read_words(args.words, args.drop_figures)
    keys = frozenset(so.count_keys(args.keys_from)) if args.keys_from else None
    uses_detector = keys is None and args.keep != "caption"
    facts: dict[str, Any] = {}
    cache: Any = nullcontext()
    if uses_detector:
        detector, facts = load_detector(args.detector, args.neighbours)
        cache = DetectionCache(args.cache or out.with_name(f"{out.name}.detections.jsonl"), facts)
    rule = FaceRule(args.min_confidence, args.min_pixels, args.min_share)
    images = Images(args.images, dict(args.prefix))
    with cache as opened:
        chooser = Chooser(args.keep, gate, images, rule, opened, keys, args.lazy)
        if uses_detector and not look_at_pictures(source, chooser, detector, args.threads, console):
            raise DataError(f"none of the pictures that {source} names lies below {args.images}; see --prefix")
        tally = write_subset(source, out, chooser, args.dedupe)
    inputs = {"annotations": describe_file(source), "words": describe_file(args.words)}
    if args.keys_from:
        inputs["keys-from"] = describe_file(args.keys_from)
    stats = {
        "arguments": {name: _plain(value) for name, value in vars(args).items()},
        "inputs": inputs,
        "output": describe_file(out),
        "detector": facts or None,
        **tally.as_dict(),
    }
    write_atomically(out.with_name(f"{out.name}.stats.json"), json.dumps(stats, indent=1, ensure_ascii=False) + "\n")
    report(tally, out, console)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return "=".join(map(str, value)) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def report(tally: Tally, out: Path, console: Console) -> None:
    """What was kept, and why the rest was not."""
    lines = [f"{out}: {tally.kept:,} of {tally.entries:,} records, {len(tally.kept_keys):,} pictures"]
    for name, found in sorted(tally.reasons.items(), key=lambda item: -item[1]["count"]):
        lines.append(f"  left out {found['count']:,}: {name} (for example {found['example']})")
    lines += [f"  caption {pair[0]}, detector {pair[1]}: {count:,}" for pair, count in sorted(tally.gates.items())]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def show_overlap(args: argparse.Namespace, console: Console) -> None:
    """Compares two files, prints and writes the report."""
    first, second = args.overlap
    counts = [so.count_keys(path) for path in (first, second)]
    result = so.compare(*counts)
    if args.images or args.prefix:
        find: Callable[[str], Path | None] = Images(args.images, dict(args.prefix)).find
        result["missing images"] = {
            side: so.missing_images(keys, find) for side, keys in zip("AB", counts, strict=True)
        }
    result["files"] = {"A": describe_file(first), "B": describe_file(second)}
    so.show(result, first, second, console)
    out = args.out or first.with_name(f"{first.stem}.overlap.json")
    write_atomically(out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


def _prefix(text: str) -> tuple[str, Path]:
    prefix, equals, folder = text.partition("=")
    if not equals or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"'{text}': expected PREFIX=FOLDER with a folder that exists")
    return prefix.strip("/"), Path(folder)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="annotation file, a JSON list")
    parser.add_argument("--overlap", type=Path, nargs=2, metavar=("A", "B"), help="compare two files instead")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--keep", choices=KEEP, default="both", help="which gates a record must pass (default: both)")
    parser.add_argument("--keys-from", type=Path, metavar="FILE", help="keep the pictures of this subset, no gates")
    parser.add_argument("--dedupe", action="store_true", help="keep the first record per picture and question")
    words = parser.add_argument_group("caption gate")
    words.add_argument("--words", type=Path, default=DEFAULT_WORDS, help="word lists (default: dataset/face_words.txt)")
    words.add_argument("--drop-figures", action="store_true", help="leave out statues, dolls, cartoons, paintings")
    look = parser.add_argument_group("detector gate")
    look.add_argument("--images", type=Path, help="folder below which the records' paths lie")
    look.add_argument(
        "--prefix", type=_prefix, action="append", default=[], metavar="PREFIX=FOLDER",
        help="pictures whose path starts with PREFIX lie in FOLDER: llava/llava_pretrain/images=LLaVA-Pretrain; repeat",
    )  # fmt: skip
    look.add_argument(
        "--detector", default="haar", help="haar (OpenCV) or module:function (see dataset/README_FACES.md)"
    )
    look.add_argument("--neighbours", type=int, default=8, help="haar: hits that must agree; more is stricter (8)")
    look.add_argument("--min-confidence", type=float, default=0.9, help="of a face, 0..1 (0.9)")
    look.add_argument("--min-pixels", type=int, default=40, help="shorter side of a face at least (40)")
    look.add_argument(
        "--min-share", type=float, default=0.05, help="and this share of the picture's shorter side (0.05)"
    )
    look.add_argument("--threads", type=int, default=1, help="pictures looked at side by side (1)")
    look.add_argument("--cache", type=Path, help="what was seen (default: OUT.detections.jsonl)")
    look.add_argument("--lazy", action="store_true", help="no look at pictures whose caption has decided already")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Everything that can be known before a file is read."""
    if (args.overlap is None) == (args.source is None):
        parser.error("give one annotation file, or --overlap A B")
    if args.images is not None and not args.images.is_dir():
        parser.error(f"--images: '{args.images}' is no folder")
    if args.overlap is None:
        if args.out is None:
            parser.error("--out is needed")
        if args.out.exists() and not args.force:
            parser.error(f"{args.out} exists; --force replaces it")
        if args.out.parent != Path() and not args.out.parent.is_dir():
            parser.error(f"--out: the folder '{args.out.parent}' does not exist")
        if args.keep != "caption" and not args.keys_from and not (args.images or args.prefix):
            parser.error(f"--keep {args.keep} looks at pictures: give --images, or --keep caption")
    if args.threads < 1 or args.neighbours < 1:
        parser.error("--threads and --neighbours must be at least 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args, console = parse_args(argv), Console()
    try:
        if args.overlap:
            show_overlap(args, console)
        else:
            make_subset(args, console)
    except MiniGPT4Error as error:
        console.print(str(error), style="red", highlight=False, soft_wrap=True, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
