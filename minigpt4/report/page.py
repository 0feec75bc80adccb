"""The whole page of one run, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from minigpt4.report import evaluation, gallery, setup, svg, training
from minigpt4.report.answers import AnswerSet
from minigpt4.report.html import page, table
from minigpt4.report.job import Job
from minigpt4.report.numbers import short
from minigpt4.report.pictures import Album

STYLE = (
    """
body { max-width: 76rem; }
nav { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .6rem 0; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .6rem; margin: .8rem 0; }
.tile { margin: 0; display: flex; flex-direction: column; } .tile b { font-size: 1.25rem; line-height: 1.3; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .88rem; min-width: 50%; }
caption { text-align: left; color: var(--dim); padding-bottom: .2rem; }
th { text-align: left; font-weight: 600; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; vertical-align: top; }
td { overflow-wrap: break-word; } td:first-child { min-width: 6.5rem; max-width: 26rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.matrices { display: flex; flex-wrap: wrap; gap: .5rem 2rem; } .matrices > div { max-width: 100%; min-width: 0; }
table.matrix, .matrix td:first-child { min-width: 0; } .matrix td, .matrix th { padding: .2rem .5rem; }
.matrix .right { background: color-mix(in srgb, var(--good) calc(var(--v) * .55), transparent); }
.matrix .wrong { background: color-mix(in srgb, var(--error) calc(var(--v) * .75), transparent); }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font: .8rem/1.45 ui-monospace, monospace;
  background: var(--page); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; margin: .3rem 0; }
.tile b { overflow-wrap: anywhere; }
.broad { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.item { display: flex; gap: .8rem; padding: .5rem 0; min-width: 0; }
.item > div { min-width: 0; overflow-wrap: anywhere; font-size: .92rem; }
.item img { flex: none; width: 7rem; height: 7rem; object-fit: contain; background: var(--page); border-radius: .3rem; }
@media (max-width: 34rem) { .n .dim { display: block; white-space: nowrap; } table { font-size: .8rem; }
  td, th { padding-right: .5rem; } td:first-child { min-width: 5.5rem; }
  .item img { width: 5.5rem; height: 5.5rem; } }
@media print { nav { display: none; } .wide { overflow: visible; } .grid { grid-template-columns: 1fr 1fr; }
  table { font-size: 8.5pt; } .n { white-space: normal; } pre { white-space: pre-wrap; font-size: 6.5pt; columns: 2; } }
"""
    + svg.STYLE
)


def render(jobs: Sequence[Job], answers: Sequence[Sequence[AnswerSet]], album: Album) -> str:
    """Every text of runs and data is escaped. ``answers``: the sets to show for each of one or two jobs."""
    title = " and ".join(job.name for job in jobs)
    if len(jobs) > 1:
        parts = _two(jobs[0], jobs[1], answers[0], answers[1], album)
    else:
        parts = _one(jobs[0], answers[0], album)
    parts = [(name, body) for name, body in parts if body]
    links = "".join(f'<a href="#part{place}">{escape(name)}</a>' for place, (name, _) in enumerate(parts))
    body = [f"<h1>{escape(title)}</h1>", *_heads(jobs), f"<nav>{links}</nav>"]
    body += [f'<h2 id="part{place}">{escape(name)}</h2>{text}' for place, (name, text) in enumerate(parts)]
    return page(title, STYLE, body)


def _heads(jobs: Sequence[Job]) -> list[str]:
    if len(jobs) == 1:
        return [f'<p class="dim small">{_about(jobs[0])}</p>', training.tiles(jobs[0])]
    parts = []
    for label, job, colour in training.labelled(jobs):
        parts.append(
            f'<h3><span class="f{colour}" style="color: var(--c{colour})">{label}</span> {escape(job.name)}</h3>'
            f'<p class="dim small">{_about(job)}</p>{training.tiles(job)}'
        )
    return parts


def _about(job: Job) -> str:
    facts = [job.manifest.get("started"), job.manifest.get("arch"), setup.ranks(job.manifest)]
    return " · ".join(escape(str(fact)) for fact in facts if fact)


def _one(job: Job, answers: Sequence[AnswerSet], album: Album) -> list[tuple[str, str]]:
    pictures = gallery.gallery(answers, album)
    asked = gallery.canaries([("", job)], album)
    return [
        ("Curves", training.curves([job]) + training.memory_phases(job)),
        ("Held-out answers", evaluation.evaluation(answers)),
        ("Examples", about_pictures(album) + pictures if pictures else ""),
        ("Canaries", asked),
        ("Data", setup.data_sets(job)),
        ("Configuration", setup.settings(job)),
        ("Origin", setup.origin(job)),
    ]


def _two(
    first: Job, second: Job, before: Sequence[AnswerSet], after: Sequence[AnswerSet], album: Album
) -> list[tuple[str, str]]:
    jobs = (first, second)
    pictures = gallery.compared_gallery(before, after, album)
    asked = gallery.canaries([("A", first), ("B", second)], album)
    each = [("A", first, before), ("B", second, after)]

    def both(make: object) -> str:
        assert callable(make)
        found = [(label, make(job)) for label, job, _ in each]
        return "".join(f"<h3>Run {label}</h3>{text}" for label, text in found if text)

    tables = [(label, evaluation.evaluation(sets)) for label, _, sets in each]
    return [
        ("A against B", _numbers(first, second)),
        ("Paired answers", evaluation.comparison(before, after)),
        ("Curves", training.curves(jobs)),
        ("Settings that differ", setup.settings_difference(first, second)),
        ("Examples", about_pictures(album) + pictures if pictures else ""),
        ("Held-out answers", "".join(f"<h3>Run {label}</h3>{text}" for label, text in tables if text)),
        ("Canaries", asked),
        ("Data", both(setup.data_sets)),
        ("Configuration", both(setup.settings)),
        ("Origin", both(setup.origin)),
    ]


def _numbers(first: Job, second: Job) -> str:
    """Numbers of both runs and their difference; those of single runs have no interval."""
    values = []
    for job in (first, second):
        newest = {f"{name}, held out": value for name, value in training.headline(job).items()}
        values.append({**newest, **dict(training.speed_rows(job))})
    names = [*values[0], *(name for name in values[1] if name not in values[0])]
    rows = []
    for name in names:
        a, b = values[0].get(name), values[1].get(name)
        change = "" if a is None or b is None else f"{b - a:+.4g}"
        relative = f" <span class=dim>({100 * (b - a) / abs(a):+.1f} %)</span>" if a and b is not None else ""
        rows.append([escape(name), short(a), short(b), change + relative])
    return table(["newest value", "A", "B", "B - A"], rows)


def about_pictures(album: Album) -> str:
    """What the reader should know about the pictures of this page."""
    notes = [f"{album.shown} pictures of the data are inside this file."]
    if album.blur:
        notes.append(album.blur.describe())
    if album.left_out:
        notes.append(f"{album.left_out} more were left out to keep it small.")
    if album.unreadable:
        notes.append(f"{album.unreadable} could not be read.")
    return f'<p class="dim small">{escape(" ".join(notes))}</p>'
