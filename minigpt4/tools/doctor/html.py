"""The report as one HTML file: no scripts, no other files, thumbnails inside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from minigpt4.report.html import page
from minigpt4.report.pictures import jpeg_url, open_small
from minigpt4.tools.doctor.checks import CHECKS, NOTE, SEVERITIES
from minigpt4.tools.doctor.examine import Finding
from minigpt4.tools.doctor.result import Problem, Result, rows
from minigpt4.tools.doctor.terminal import records, share, verdict

SHOWN = 8
"""Examples per problem."""
_SIDE = 144
_BARS = 12
_STYLE = """
ul { list-style: none; margin: .7rem 0 0; padding: 0; }
li { display: flex; gap: .8rem; border-top: 1px solid var(--line); padding: .6rem 0; }
li > div { min-width: 0; overflow-wrap: anywhere; }
img { flex: none; width: 5.5rem; height: 5.5rem; object-fit: contain; background: var(--page); border-radius: .3rem; }
blockquote { margin: .3rem 0 0; padding-left: .6rem; border-left: 3px solid var(--line); color: var(--dim);
  font-size: .85rem; white-space: pre-wrap; }
.bars { display: grid; grid-template-columns: minmax(4rem, auto) 1fr auto; gap: .15rem .7rem; align-items: center;
  font-size: .85rem; }
.bars span:nth-child(3n+1) { overflow-wrap: anywhere; max-width: 14rem; }
.bars i { display: block; height: .7rem; min-width: 2px; border-radius: .2rem; background: var(--bar); }
.bars span:nth-child(3n) { text-align: right; font-variant-numeric: tabular-nums; }
"""


def render(results: Sequence[Result], title: str, notes: Sequence[str]) -> str:
    """The whole page. Every text of the data is escaped."""
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(verdict(results))}</p>",
        *(f'<p class="dim">{escape(note)}</p>' for note in notes),
    ]
    if len(results) > 1:
        parts.append(f'<div class="card">{"".join(_link(number, item) for number, item in enumerate(results))}</div>')
    for number, result in enumerate(results):
        parts += _result(number, result)
    return page(title, _STYLE, parts)


def _link(number: int, result: Result) -> str:
    counts = "".join(
        f' <span class="tag {name}">{result.number(name):,} {name}{"" if result.number(name) == 1 else "s"}</span>'
        for name in SEVERITIES
        if result.number(name)
    )
    return (
        f'<p><a href="#set{number}">{escape(result.title)}</a> <span class="dim">{records(result)}</span>{counts}</p>'
    )


def _result(number: int, result: Result) -> list[str]:
    parts = [f'<h2 id="set{number}">{escape(result.title)}</h2>', f'<p class="dim">{records(result)}</p>']
    for kind, folder in result.folders.items():
        parts.append(f'<p class="dim small">{kind} in <code>{escape(folder)}</code></p>')
    parts += [_problem(problem, result) for problem in result.sorted_problems]
    if not result.problems:
        parts.append('<div class="card">Nothing to complain about.</div>')
    bars = [_bars(name, rows(counter, _BARS)) for name, counter in sorted(result.histograms.items())]
    return [*parts, f'<div class="grid">{"".join(bars)}</div>' if bars else ""]


def _problem(problem: Problem, result: Result) -> str:
    check = CHECKS[problem.check]
    more = problem.count - min(SHOWN, len(problem.examples))
    left = f'<p class="dim small">and {more:,} more</p>' if more else ""
    items = "".join(_example(finding, result) for finding in problem.examples[:SHOWN])
    is_open = " open" if check.severity != NOTE else ""
    return (
        f'<details{is_open}><summary><span class="tag {check.severity}">{check.severity}</span><b>{escape(check.title)}'
        f'</b><span class="dim">{share(problem, result)}</span></summary><p class="dim small">{escape(check.advice)} '
        f"(<code>{problem.check}</code>)</p><ul>{items}</ul>{left}</details>"
    )


def _example(finding: Finding, result: Result) -> str:
    picture = thumbnail(finding.image)
    image = f'<img alt="" src="{picture}">' if picture else ""
    lines = [f"<p>{escape(result.short(finding.detail))}</p>"]
    places = [finding.where, finding.record_id and f"id {finding.record_id}", finding.image]
    shown = " · ".join(f"<code>{escape(result.short(place))}</code>" for place in places if place)
    lines.append(f'<p class="small dim">{shown}</p>')
    if finding.text:
        lines.append(f"<blockquote>{escape(finding.text)}</blockquote>")
    return f"<li>{image}<div>{''.join(lines)}</div></li>"


def thumbnail(path: str) -> str:
    """A small JPEG as a data URL; empty when there is no picture or it cannot be read."""
    image = open_small(path, _SIDE)
    return "" if image is None else jpeg_url(image)


def _bars(name: str, found: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in found)
    bars = "".join(
        f'<span>{escape(value)}</span><i style="width:{100 * count / most:.1f}%"></i><span>{count:,}</span>'
        for value, count in found
    )
    return f'<div class="card"><h3>{escape(name)}</h3><div class="bars">{bars}</div></div>'
