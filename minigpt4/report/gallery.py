"""Held-out answers with their pictures, and the answers to canaries as the run went on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minigpt4.report.answers import Answer, AnswerSet, has_labels
from minigpt4.report.evaluation import paired
from minigpt4.report.html import fold, table
from minigpt4.report.job import Job
from minigpt4.report.numbers import number
from minigpt4.report.pictures import Album

SHOWN = 8
"""Examples of one kind and data set."""
_SETS = 12
_PICTURES = 2
_LONGEST = 600
_STEPS = 12
"""Validations of one canary; of more than these those in which the answer changed, and the last."""


def gallery(answers: Sequence[AnswerSet], album: Album) -> str:
    """Wrong and right answers of one run, spread over each data set."""
    parts = []
    for item in answers[:_SETS]:
        for title, rows in _kinds(item):
            cards = "".join(_card([("answer", row)], album) for row in spread(rows))
            parts.append(_block(item.name, title, len(rows), cards))
    return "".join(parts)


def compared_gallery(first: Sequence[AnswerSet], second: Sequence[AnswerSet], album: Album) -> str:
    """Questions that two runs answer differently well."""
    others = {item.name: item for item in second}
    parts = []
    for item in [item for item in first if item.name in others][:_SETS]:
        pairs = paired(item, others[item.name])
        kinds = {
            "only A is right": [pair for pair in pairs if pair[0].is_right and not pair[1].is_right],
            "only B is right": [pair for pair in pairs if pair[1].is_right and not pair[0].is_right],
            "both are wrong": [pair for pair in pairs if not pair[0].is_right and not pair[1].is_right],
        }
        for title, rows in kinds.items():
            cards = "".join(_card([("A", a), ("B", b)], album) for a, b in spread(rows))
            parts.append(_block(item.name, title, len(rows), cards))
    return "".join(parts)


def canaries(jobs: Sequence[tuple[str, Job]], album: Album) -> str:
    """Question and answer at each validation."""
    parts = []
    for label, job in jobs:
        for source, steps in _by_source(job).items():
            _, first = steps[0]
            reference = str(first.get("reference") or "")
            picture = _image(canary_picture(job, source), album)
            known = f'<p class="dim small">reference: {escape(_cut(reference))}</p>' if reference else ""
            lines = [(f"{window:,}", escape(_cut(str(row.get("answer", ""))))) for window, row in _changes(steps)]
            title = f"{escape(source)}{f' <span class=dim>run {label}</span>' if label else ''}"
            parts.append(
                f'<div class="card whole"><h3>{title}</h3><div class="item">{picture}<div>'
                f"<p>{escape(_cut(str(first.get('question', ''))))}</p>{known}</div></div>"
                f"{table(['window', 'answer'], lines, texts=2)}</div>"
            )
    return f'<div class="grid broad">{"".join(parts)}</div>' if parts else ""


def canary_picture(job: Job, source: str) -> Path | None:
    """The picture of a canary: that of the configuration, or that of the same held-out sample."""
    run = job.config.get("run")
    valid = run.get("valid") if isinstance(run, Mapping) else None
    own = valid.get("canaries") if isinstance(valid, Mapping) else None
    for place, canary in enumerate(own if isinstance(own, list) else [], start=1):
        if source == f"canary {place}" and isinstance(canary, Mapping) and canary.get("image"):
            return Path(str(canary["image"]))
    rows = (row for item in job.answers for row in item.rows if row.id == source and row.images)
    found = next(rows, None)
    return found.images[0] if found else None


def spread(rows: Sequence[Any], count: int = SHOWN) -> list[Any]:
    """At most ``count`` of them, evenly over the whole."""
    if len(rows) <= count:
        return list(rows)
    return [rows[place * len(rows) // count] for place in range(count)]


def _kinds(item: AnswerSet) -> list[tuple[str, list[Answer]]]:
    right = [row for row in item.rows if row.is_right]
    wrong = [row for row in item.rows if not row.is_right]
    if right or has_labels(item.rows):
        return [("wrong", wrong), ("right", right)]
    by_overlap = sorted(wrong, key=lambda row: row.overlap)  # long answers: none is equal to its reference
    half = (len(by_overlap) + 1) // 2
    return [("farthest from the reference", by_overlap[:half][:SHOWN]), ("nearest", by_overlap[half:][-SHOWN:])]


def _block(name: str, title: str, count: int, cards: str) -> str:
    if not cards:
        return ""
    more = f"{SHOWN} of {count:,}" if count > SHOWN else f"{count:,}"
    summary = f'{escape(name)}: {escape(title)} <span class="dim">{more}</span>'
    return fold(summary, f'<div class="grid broad">{cards}</div>', is_open=True)


def _card(rows: Sequence[tuple[str, Answer]], album: Album) -> str:
    first = rows[0][1]
    pictures = "".join(_image(path, album) for path in first.images[:_PICTURES])
    section = f" · {escape(first.section)}" if first.section else ""
    lines = [f'<p class="small dim">{escape(first.id)}{section}</p><p>{escape(_cut(first.question))}</p>']
    for label, row in rows:
        tag = "good" if row.is_right else "error"
        word = "right" if row.is_right else "wrong"
        name = f"{label} " if len(rows) > 1 else ""
        lines.append(f'<p><span class="tag {tag}">{name}{word}</span> {escape(_cut(row.answer)) or "<i>empty</i>"}</p>')
    lines.append(f'<p class="small dim">reference: {escape(_cut(" | ".join(first.references)))}</p>')
    return f'<div class="item whole">{pictures}<div>{"".join(lines)}</div></div>'


def _image(path: Path | None, album: Album) -> str:
    url = album.url(path) if path else ""
    return f'<img alt="" src="{url}">' if url else ""


def _by_source(job: Job) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for event in job.canaries:
        rows = event.get("answers")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, Mapping):
                found.setdefault(str(row.get("source", "")), []).append((int(number(event, "window") or 0), row))
    return found


def _changes(steps: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterable[tuple[int, Mapping[str, Any]]]:
    if len(steps) <= _STEPS:
        return steps
    changed = [
        step
        for before, step in zip([None, *steps][:-1], steps, strict=True)
        if before is None or before[1].get("answer") != step[1].get("answer")
    ]
    return [*spread(changed, _STEPS - 1), *([steps[-1]] if steps[-1] not in changed else [])]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 6]} [...]"
