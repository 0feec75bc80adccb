"""The report as one HTML file: no scripts, no other files, thumbnails inside."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from minigpt4.tools.doctor.checks import CHECKS, NOTE, SEVERITIES
from minigpt4.tools.doctor.examine import Finding
from minigpt4.tools.doctor.result import Problem, Result, rows
from minigpt4.tools.doctor.terminal import records, share, verdict

SHOWN = 8
"""Examples per problem."""
_SIDE = 144
_BARS = 12
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --dim: #5f6672; --page: #f5f6f8; --card: #ffffff; --line: #dfe2e7;
  --error: #b3261e; --warning: #8a5a00; --note: #1f5fa8; --bar: #7aa5d8; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --dim: #9aa2ad; --page: #14171b; --card: #1d2126;
  --line: #343a42; --error: #ff8a80; --warning: #f3bf57; --note: #8ab8f5; --bar: #45699a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .2rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .2rem 0; } .dim { color: var(--dim); } .small { font-size: .85rem; }
a { color: var(--note); }
code { font: .85em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
details, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: .6rem 0;
  padding: .7rem .9rem; }
summary { cursor: pointer; display: flex; flex-wrap: wrap; gap: .2rem .7rem; align-items: baseline; }
summary b { flex: 1 1 16rem; font-weight: 600; }
.tag { font-size: .75rem; font-weight: 700; letter-spacing: .02em; border: 1px solid; border-radius: 1rem;
  padding: 0 .6rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
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
.grid { display: grid; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .6rem; }
.grid .card { margin: 0; min-width: 0; }
"""


def render(results: Sequence[Result], title: str, notes: Sequence[str]) -> str:
    """The whole page. Every text of the data is escaped."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(verdict(results))}</p>",
        *(f'<p class="dim">{escape(note)}</p>' for note in notes),
    ]
    if len(results) > 1:
        parts.append(f'<div class="card">{"".join(_link(number, item) for number, item in enumerate(results))}</div>')
    for number, result in enumerate(results):
        parts += _result(number, result)
    return "\n".join([*parts, "</body></html>\n"])


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
    if not path or not Path(path).is_file():
        return ""
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.draft("RGB", (_SIDE, _SIDE))
                image.thumbnail((_SIDE, _SIDE))
                image.convert("RGB").save(stream, "JPEG", quality=75)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""  # an example of a picture that cannot be read
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _bars(name: str, found: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in found)
    bars = "".join(
        f'<span>{escape(value)}</span><i style="width:{100 * count / most:.1f}%"></i><span>{count:,}</span>'
        for value, count in found
    )
    return f'<div class="card"><h3>{escape(name)}</h3><div class="bars">{bars}</div></div>'
