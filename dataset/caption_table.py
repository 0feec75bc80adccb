"""BLIP's caption lists (JSON, gigabytes) -> the table of addresses and captions that img2dataset downloads."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from minigpt4.common.errors import DataError, MiniGPT4Error
from minigpt4.common.files import open_atomically
from minigpt4.datasets.annotations import check_file
from minigpt4.datasets.json_lists import stream_list

COLUMNS = ("url", "caption")
_STEP = 10_000


def rows_of(records: Iterator[Any], source: Path, broken: list[str]) -> Iterator[tuple[str, str]]:
    """Address and caption per record, on one line each; records without both are named in ``broken``."""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{source}, record {number}: found {type(record).__name__}, expected an object")
        values = [record.get(name) for name in COLUMNS]
        url, caption = (" ".join(value.split()) if isinstance(value, str) else "" for value in values)
        if url and caption:
            yield url, caption
        else:
            broken.append(f"record {number} has {', '.join(map(str, record)) or 'no field'}")


def convert(source: Path, out: Path, console: Console) -> int:
    """Writes the table; the list is read piece by piece. Returns the number of rows. Raises DataError."""
    check_file(source)
    broken: list[str] = []
    count = 0
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        source.open("rb") as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig") as stream,
        open_atomically(out) as file,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("", total=source.stat().st_size)
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(COLUMNS)
        try:
            for row in rows_of(stream_list(stream), source, broken):
                table.writerow(row)
                count += 1
                if count % _STEP == 0:
                    progress.update(task, completed=raw.tell())
        except ValueError as error:  # not JSON, not a list, not UTF-8
            raise DataError(f"{source}, after row {count}: not a JSON list: {error}") from None
        progress.update(task, completed=raw.tell())
        if not count:
            raise DataError(f"{source}: no record has the fields {' and '.join(COLUMNS)}")
    if broken:
        console.print(f"{len(broken):,} records left out, for example {broken[0]}", style="yellow", highlight=False)
    return count


def main(description: str, source: str, out: str, argv: Sequence[str] | None = None) -> None:
    """Command line of the scripts that name their list and table."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=Path(source), help=f"JSON list (default: {source})")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"table to write (default: {out})")
    parser.add_argument("--force", action="store_true", help="replace the table if it exists")
    args = parser.parse_args(argv)
    console = Console()
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists; --force replaces it")
    if not args.out.parent.is_dir():
        parser.error(f"--out: the folder '{args.out.parent}' does not exist")
    try:
        count = convert(args.source, args.out, console)
    except MiniGPT4Error as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    console.print(f"{args.out}: {count:,} addresses with captions", highlight=False, soft_wrap=True)
