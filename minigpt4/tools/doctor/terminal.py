"""The summary on the terminal: one table per split."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minigpt4.tools.doctor.checks import CHECKS, ERROR, NOTE, WARNING
from minigpt4.tools.doctor.examine import Finding
from minigpt4.tools.doctor.result import Problem, Result, rows

COLOURS = {ERROR: "red", WARNING: "yellow", NOTE: "cyan"}


def show(results: Sequence[Result], console: Console, examples: int) -> None:
    """Prints every result with up to ``examples`` places per check, then one line for all."""
    for result in results:
        console.print()
        console.print(Text(headline(result), style="bold"))
        for kind, folder in result.folders.items():
            console.print(Text(f"  {kind} in {folder}", style="dim"), soft_wrap=True)
        if result.problems:
            console.print(_table(result))
            _show_places(result, console, examples)
        else:
            console.print(Text("  nothing to complain about", style="green"))
        for line in histogram_lines(result):
            console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    console.print()
    console.print(Text(verdict(results), style="bold"))


def headline(result: Result) -> str:
    """'faces: 1,000 records, 200 of them looked at, spread evenly'."""
    return f"{result.title}: {records(result)}"


def records(result: Result) -> str:
    """'1,000 records', and how many of them were looked at."""
    sampled = f", {result.looked_at:,} of them looked at, spread evenly" if result.looked_at < result.size else ""
    return f"{result.size:,} records{sampled}"


def verdict(results: Sequence[Result]) -> str:
    """Counts of all together."""
    counts = {name: sum(result.number(name) for result in results) for name in COLOURS}
    looked_at, wrong = sum(result.looked_at for result in results), sum(len(result.wrong) for result in results)
    found = ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    return f"{looked_at:,} records: {found}; {wrong:,} record{'' if wrong == 1 else 's'} with an error"


def share(problem: Problem, result: Result) -> str:
    """'12' or '12 (3.1 %)'."""
    if not result.looked_at:
        return f"{problem.count:,}"
    return f"{problem.count:,} ({100 * problem.count / result.looked_at:.1f} %)"


def _table(result: Result) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("severity", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("records", justify="right", no_wrap=True)
    table.add_column("what")
    for problem in result.sorted_problems:
        check = CHECKS[problem.check]
        severity = Text(check.severity, style=COLOURS[check.severity])
        table.add_row(severity, problem.check, share(problem, result), Text(check.title))
    return table


def _show_places(result: Result, console: Console, examples: int) -> None:
    for problem in result.sorted_problems:
        check = CHECKS[problem.check]
        heading = Text(f"  {problem.check}", style=COLOURS[check.severity])
        console.print(heading.append(f": {check.advice}", style="default"), soft_wrap=True, highlight=False)
        for finding in problem.examples[:examples]:
            console.print(Text(f"    {result.short(place(finding))}", style="dim"), soft_wrap=True)
        if problem.count > examples:
            console.print(Text(f"    and {problem.count - examples:,} more", style="dim"))


def place(finding: Finding) -> str:
    """'faces.csv, line 7, id 12: 0 bytes [12.jpg]'."""
    name = f"id {finding.record_id}" if finding.record_id else ""
    where = ", ".join(part for part in (finding.where, name) if part)
    image = f" [{finding.image}]" if finding.image and finding.image not in finding.detail else ""
    return ": ".join(part for part in (where, finding.detail) if part) + image


def histogram_lines(result: Result, most: int = 6) -> list[str]:
    """'picture size: 256 to 511 x 90, 512 to 1023 x 10'."""
    lines = []
    for name, counter in sorted(result.histograms.items()):
        found = rows(counter)
        is_range = any(isinstance(value, int) for value in counter)
        shown = found if is_range else found[:most]
        left = sum(count for _, count in found) - sum(count for _, count in shown)
        items = [f"{value} ×{count:,}" for value, count in shown] + ([f"others ×{left:,}"] if left else [])
        lines.append(f"{name}: {' · '.join(items)}")
    return lines
