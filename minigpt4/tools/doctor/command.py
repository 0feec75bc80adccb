"""``minigpt4 doctor``: everything that the data of a run names, looked at before it costs anything."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minigpt4.common.schema import Config
    from minigpt4.tools.doctor.result import Result

EPILOG = """\
exit code: 0 no errors, 1 errors in the data, 2 mistakes in the command line or the YAML file

examples:
  minigpt4 doctor --cfg-path run.yaml
  minigpt4 doctor --cfg-path run.yaml --sample 2000 --report report.html
  minigpt4 doctor --cfg-path run.yaml --decode --clean cleaned --json found.json

No weights are read. Every check is explained in docs/DOCTOR.md."""


def main(argv: Sequence[str]) -> int:
    """Look at the data of one run; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    parser = build_parser()
    given = parser.parse_args(argv)
    if given.clean and given.sample:
        parser.error("--clean needs every record; leave --sample out")

    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked

    from minigpt4 import catalog
    from minigpt4.common.config import load_config

    catalog.load()
    cfg = load_config(given.cfg_path, given.options, check_data=False, check_weights=False)
    return examine(cfg, given)


def examine(cfg: Config, given: argparse.Namespace) -> int:
    """Survey, summary and the files asked for; returns the exit code."""
    from rich.console import Console

    from minigpt4.tools.doctor.checks import ERROR
    from minigpt4.tools.doctor.clean import write_clean
    from minigpt4.tools.doctor.opening import Wishes, find_encoder, open_splits
    from minigpt4.tools.doctor.survey import survey
    from minigpt4.tools.doctor.terminal import show

    console = Console()
    opened = open_splits(cfg, Wishes(given.sample, given.decode, not given.no_leaks))
    encoder, reason = find_encoder(cfg)
    results = survey(opened, encoder, cfg.run.seed, given.workers)
    notes = [reason] if reason else []
    show(results, console, given.examples)
    if given.clean:
        by_title = {result.title: result for result in results}
        notes += write_clean(Path(given.clean), opened.splits, by_title)
    write_reports(given, results, notes)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(result.number(ERROR) for result in results) else 0


def write_reports(given: argparse.Namespace, results: Sequence[Result], notes: Sequence[str]) -> None:
    """``--report`` and ``--json``."""
    import json

    from minigpt4.common.files import write_atomically
    from minigpt4.tools.doctor.html import render

    if given.report:
        write_atomically(Path(given.report), render(results, f"Data of {Path(given.cfg_path).name}", notes))
    if given.json:
        content = {"notes": list(notes), "data_sets": [result.to_json() for result in results]}
        write_atomically(Path(given.json), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 doctor``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 doctor",
        description="Look at all records and pictures of a run's data sets: what would stop the training, what would "
        "teach nonsense, what leaks into validation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help="YAML file with model, datasets and run")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument("--sample", type=_count, default=0, metavar="N", help="N records per data set, spread evenly")
    parser.add_argument("--workers", type=_count, default=0, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--decode", action="store_true", help="decode every picture, not only 256 per data set")
    parser.add_argument(
        "--no-leaks", action="store_true", help="do not compare pictures of training and validation (reads all bytes)"
    )
    parser.add_argument("--examples", type=_count, default=3, metavar="N", help="places shown per check (default 3)")
    parser.add_argument("--report", metavar="FILE", help="write one self-contained HTML file")
    parser.add_argument("--json", metavar="FILE", help="write everything found as JSON")
    parser.add_argument("--clean", metavar="DIR", help="write DIR/NAME/clean.jsonl: the records without errors")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number from 1 on")
    return number
