"""``minigpt4 report``: one page about a run, or about two side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
examples:
  minigpt4 report output/my_faces/20260101_120000
  minigpt4 report output/my_faces/20260101_120000 output/my_faces/20260102_090000 --out compared.html
  minigpt4 report output/my_faces --predictions answers.jsonl --blur-faces

The page is one file: no scripts, nothing is fetched. See docs/REPORT.md."""


def main(argv: Sequence[str]) -> int:
    """Write one report; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    given = build_parser().parse_args(argv)
    runs = [given.run, *([given.run2] if given.run2 else [])]

    from minigpt4 import catalog
    from minigpt4.report.write import Wishes, write_report

    catalog.load()  # the defaults of a configuration are those of the classes it names
    predictions = [[Path(path) for path in files] for files in given.predictions]
    wishes = Wishes(Path(given.out) if given.out else None, predictions, given.blur_faces, round(1e6 * given.max_mb))
    print(write_report(runs, wishes))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 report``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 report",
        description="Write one HTML file about a training run: curves, scores with intervals, answers with pictures, "
        "configuration. With two runs: what differs, and whether it is more than chance.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="job folder, a checkpoint in it, or a folder of jobs (the newest)")
    parser.add_argument("run2", nargs="?", metavar="RUN2", help="a second run, to compare with")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the job folder")
    parser.add_argument(
        "--predictions",
        nargs="+",
        action="append",
        default=[],
        metavar="FILE",
        help="JSON lines with id, question, answer, reference; with two runs a pair of files, the first of RUN",
    )
    parser.add_argument(
        "--blur-faces",
        nargs="?",
        const="auto",
        default="",
        choices=["auto", "whole"],
        help="blur the faces that OpenCV finds, else the whole picture (auto), or every picture as a whole",
    )
    parser.add_argument("--max-mb", type=_size, default=6.0, metavar="N", help="of all pictures together (default 6)")
    return parser


def _size(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"found {text}, expected 0 (no pictures) to 1000")
    return number
