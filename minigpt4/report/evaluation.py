"""Tables of held-out answers: scores with their 95 % intervals, sections, properties of people, confusions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from minigpt4.metrics.accuracy import majority_accuracy, plain
from minigpt4.metrics.intervals import Interval, macro_f1_interval, mean_interval, paired_difference, share_interval
from minigpt4.report.answers import Answer, AnswerSet, has_labels
from minigpt4.report.html import fold, table
from minigpt4.report.numbers import NONE, difference, interval, percent

_MATRICES = 8
_FEW = 10
"""Rows below which a share says little."""
NOTE = (
    "Ranges are 95 % intervals by bootstrap; questions about one picture are drawn together. "
    "Exact: equal to the reference but for case and a full stop. Word F1: overlap of words. "
    "Majority: what always giving the most frequent reference would score."
)


def evaluation(answers: Sequence[AnswerSet]) -> str:
    """All tables of one run."""
    if not answers:
        return ""
    parts = [
        f'<p class="dim small">{NOTE}</p>',
        table(
            ["data set", "answers", "exact", "majority", "macro F1", "word F1"],
            [_line(item.name, item) for item in answers],
        ),
    ]
    for item in answers:
        parts += _details(item)
    return "".join(parts)


def comparison(first: Sequence[AnswerSet], second: Sequence[AnswerSet]) -> str:
    """Paired differences of two runs over the questions that both were asked."""
    others = {item.name: item for item in second}
    rows: list[list[str]] = []
    notes: list[str] = []
    for item in first:
        if item.name not in others:
            continue
        pairs = paired(item, others[item.name])
        if not pairs:
            notes.append(f"{item.name}: the two runs share no question (ids and references differ).")
            continue
        if len(pairs) < max(len(item.rows), len(others[item.name].rows)):
            counts = f"{len(item.rows)} answers of A, {len(others[item.name].rows)} of B"
            notes.append(f"{item.name}: {len(pairs)} questions were asked in both runs ({counts}).")
        if item.window is not None:
            notes.append(f"{item.name}: A answered after window {item.window}, B after {others[item.name].window}.")
        rows += _compared(item.name, pairs)
    if not rows:
        return "".join(f'<p class="dim">{escape(note)}</p>' for note in notes)
    header = ["data set", "score", "n", "A, %", "B, %", "B - A, points"]
    return (
        '<p class="dim small">Both runs answered the same questions, so differences are taken question by question. A '
        "difference in bold is more than chance: its 95 % interval leaves out zero.</p>"
        + table(header, rows, texts=2)
        + "".join(f'<p class="dim small">{escape(note)}</p>' for note in notes)
    )


def paired(first: AnswerSet, second: AnswerSet) -> list[tuple[Answer, Answer]]:
    """Answers of two runs to the same question, in the order of the first."""
    return [(row, second.by_key[key]) for key, row in first.by_key.items() if key in second.by_key]


def confusion(title: str, rows: Sequence[Answer]) -> str:
    """References downwards, answers across; answers that are no label stand in the last column."""
    labels = sorted({plain(row.references[0]) for row in rows})
    shown = {plain(text): text for row in rows for text in (row.references[0],)}
    counts = Counter((plain(row.references[0]), _given(row, labels)) for row in rows)
    has_other = any(given == "" for _, given in counts)
    columns = [*labels, *([""] if has_other else [])]
    lines = []
    for label in labels:
        total = sum(counts[label, given] for given in columns)
        cells = [_cell(counts[label, given], total, given == label) for given in columns]
        lines.append(f"<tr><th>{escape(shown[label].strip())}</th>{''.join(cells)}</tr>")
    head = "".join(f'<th class="n">{escape(shown[given].strip()) if given else "other"}</th>' for given in columns)
    return (
        f'<div class="whole"><p class="small dim">{escape(title)}</p><div class="wide"><table class="matrix">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def _given(row: Answer, labels: Sequence[str]) -> str:
    answer = plain(row.answer)
    return answer if answer in labels else ""


def _cell(count: int, total: int, is_right: bool) -> str:
    strength = round(100 * count / total) if total else 0
    kind = "right" if is_right else "wrong"
    return f'<td class="n {kind}" style="--v:{strength}%">{count or ""}</td>'


def _line(name: str, item: AnswerSet) -> list[str]:
    rows, groups = item.rows, item.pictures
    references = [row.references[0] for row in rows]
    f1 = NONE
    if has_labels(rows):
        f1 = interval(macro_f1_interval([plain(row.answer) for row in rows], list(map(plain, references)), groups))
    return [
        f"{escape(name)}{'' if item.window is None else f' <span class=dim>window {item.window}</span>'}",
        f"{len(rows):,}",
        interval(share_interval([row.is_right for row in rows], groups)),
        percent(majority_accuracy(references)),
        f1,
        interval(mean_interval([row.overlap for row in rows], groups)),
    ]


def _details(item: AnswerSet) -> Iterator[str]:
    title = escape(item.name)
    sections = item.sections()
    if sections:
        yield fold(f"{title}: by section", _groups("section", sections), is_open=True)
    if slices := item.slices():
        body = "".join(_groups(name, groups) for name, groups in slices.items())
        note = (
            '<p class="dim small">A gap between groups may come from their questions, their number or the model. Where '
            "intervals overlap widely, these answers cannot tell.</p>"
        )
        yield fold(f"{title}: by property of the record", note + body, is_open=True)
    candidates = [("all", item.rows)] if has_labels(item.rows) else []
    candidates += [(name, rows) for name, rows in sections.items() if has_labels(rows)]
    matrices = [confusion(name, rows) for name, rows in candidates[:_MATRICES]]
    if matrices:
        body = f'<div class="matrices">{"".join(matrices)}</div>'
        yield fold(f"{title}: confusions (reference downwards, answer across)", body, is_open=True)


def _groups(name: str, groups: dict[str, list[Answer]]) -> str:
    lines = []
    for value, rows in groups.items():
        pictures = [row.picture for row in rows]
        few = ' <span class="warning">few</span>' if len(rows) < _FEW else ""
        lines.append(
            [
                f"{escape(value)}{few}",
                f"{len(rows):,}",
                interval(share_interval([row.is_right for row in rows], pictures)),
                interval(mean_interval([row.overlap for row in rows], pictures)),
            ]
        )
    shares = [sum(row.is_right for row in rows) / len(rows) for rows in groups.values()]
    gap = f"{name} (largest gap of exact: {100 * (max(shares) - min(shares)):.1f} points)"
    return table([escape(name), "answers", "exact", "word F1"], lines, caption=gap)


def _compared(name: str, pairs: Sequence[tuple[Answer, Answer]]) -> Iterator[list[str]]:
    groups = [row.picture for row, _ in pairs]
    scores = {
        "exact": ([float(a.is_right) for a, _ in pairs], [float(b.is_right) for _, b in pairs]),
        "word F1": ([a.overlap for a, _ in pairs], [b.overlap for _, b in pairs]),
    }
    for score, (before, after) in scores.items():
        found: Interval = paired_difference(before, after, groups)
        shown = difference(found)
        yield [
            escape(name), score, f"{len(pairs):,}",
            f"{100 * sum(before) / len(pairs):.1f}", f"{100 * sum(after) / len(pairs):.1f}",
            f"<b>{shown}</b>" if found.excludes_zero else shown,
        ]  # fmt: skip
