"""HTML pages that are one file: no scripts, nothing fetched, light and dark, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --dim: #5f6672; --page: #f5f6f8; --card: #ffffff; --line: #dfe2e7;
  --error: #b3261e; --warning: #8a5a00; --note: #1f5fa8; --good: #1d6b36; --bar: #7aa5d8; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --dim: #9aa2ad; --page: #14171b; --card: #1d2126;
  --line: #343a42; --error: #ff8a80; --warning: #f3bf57; --note: #8ab8f5; --good: #7ed492; --bar: #45699a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .2rem; }
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
.good { color: var(--good); }
.grid { display: grid; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .6rem; }
.grid .card { margin: 0; min-width: 0; }
@media print { :root { color-scheme: light; --text: #000; --dim: #444; --page: #fff; --card: #fff; --line: #bbb;
  --error: #b3261e; --warning: #8a5a00; --note: #1f5fa8; --good: #1d6b36; --bar: #7aa5d8; }
  body { max-width: none; padding: 0; font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; }
  h2, h3, summary { break-after: avoid; } tr, li, figure, .whole { break-inside: avoid; }
  thead { display: table-header-group; } }
"""
"""Colours, text, cards and folds that every page shares."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page; ``title`` is escaped, ``body`` is HTML already. The browser is told to load and run nothing."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1, caption: str = "") -> str:
    """A table that scrolls sideways where it is too wide; cells are HTML already.

    texts: how many of the first columns hold words; the others hold numbers.
    """
    kinds = ["" if place < texts else ' class="n"' for place in range(len(header))]
    head = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, header, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def fold(summary: str, body: str, is_open: bool = False) -> str:
    """A part that opens on a click, and on paper; both texts are HTML already."""
    return f"<details{' open' if is_open else ''}><summary><b>{summary}</b></summary>{body}</details>"
