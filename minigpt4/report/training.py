"""The part of a report about the training itself: verdict numbers, curves, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from minigpt4.common.curve import smoothed
from minigpt4.report.html import table
from minigpt4.report.job import Job, Rows
from minigpt4.report.numbers import NONE, clock, number, short
from minigpt4.report.svg import Line, chart, shares

PHASES = (
    ("wait_s", "data wait"),
    ("vision_s", "vision"),
    ("language_s", "language"),
    ("backward_s", "backward"),
    ("optimizer_s", "optimiser"),
)
_CHARTS = (
    ("lr", "Learning rate", "per step"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("samples_per_s", "Throughput", "samples / s, all ranks"),
    ("target_tokens_per_s", "Throughput", "target tokens / s, all ranks"),
    ("memory_gb", "Memory", "GB, peak"),
)
_NO_CURVE = {"window", "event"}


def tiles(job: Job) -> str:
    """The numbers that tell how a run went."""
    last = job.last
    found = [("Run", job.status, f"{job.window:,} windows, {clock(job.seconds)}", _status_class(job))]
    if (best := number(job.state, "best")) is not None:
        found.append(
            (f"Best {job.state.get('best_by', '')}", short(best), f"window {job.state.get('best_window')}", "")
        )
    for name, value in headline(job).items():
        found.append((f"Held-out {name}", short(value), f"window {job.checks[-1].get('window')}", ""))
    found.append(("Training loss", short(number(last, "loss_avg")), "per target token, latest", ""))
    found.append(("Speed", f"{short(number(last, 'samples_per_s'))} / s", "samples, latest", ""))
    found.append(
        ("Memory", f"{short(peak(job.windows, 'memory_gb'))} GB", f"peak, {job.manifest.get('device', '')}", "")
    )
    troubles = list(warnings(job))
    cards = "".join(
        f'<div class="card tile"><span class="dim small">{escape(str(title))}</span>'
        f'<b class="{kind}">{escape(value)}</b>'
        f'<span class="dim small">{escape(note)}</span></div>'
        for title, value, note, kind in found
    )
    return f'<div class="tiles">{cards}</div>' + "".join(f'<p class="warning">{escape(line)}</p>' for line in troubles)


def headline(job: Job) -> dict[str, float]:
    """The newest validation: means over the data sets, 'loss' -> value."""
    newest = job.checks[-1] if job.checks else {}
    values = {
        key.removeprefix("val_"): number(newest, key) for key in newest if "/" not in key and key not in _NO_CURVE
    }
    return {name: value for name, value in values.items() if value is not None}


def warnings(job: Job) -> Iterator[str]:
    """What a reader must not overlook."""
    if not job.windows:
        yield "log.txt holds no window, so there are no curves (run.trackers: jsonl writes it)."
    if skipped := number(job.last, "skipped"):
        yield f"{short(skipped)} windows had no target tokens and were skipped."
    for name, facts in bad_records(job).items():
        yield f"{name}: {facts.get('count')} records could not be read and were passed over."
    yield from remarks(job)


def bad_records(job: Job) -> dict[str, dict[str, object]]:
    """Data set -> count and examples, of those that have any."""
    found = job.manifest.get("bad_records")
    rows = found.items() if isinstance(found, dict) else ()
    return {str(name): facts for name, facts in rows if isinstance(facts, dict) and facts.get("count")}


def remarks(job: Job) -> list[str]:
    """Sentences of the load reports."""
    reports = job.manifest.get("load_report")
    rows = [report for report in reports if isinstance(report, dict)] if isinstance(reports, list) else []
    return [str(text) for report in rows for text in report.get("remarks") or []]


def peak(rows: Rows, key: str) -> float | None:
    """The largest value."""
    return max((value for row in rows if (value := number(row, key)) is not None), default=None)


def points(rows: Rows, key: str) -> list[tuple[float, float]]:
    """Window and value of the lines that hold a number."""
    return [(float(row["window"]), value) for row in rows if (value := number(row, key)) is not None]


def curves(jobs: Sequence[Job]) -> str:
    """All charts; two runs lie over each other."""
    marks = sorted({float(window) for job in jobs for window in job.resumes})
    parts = [_loss(jobs, marks), *_validation(jobs)]
    for key, title, unit in _CHARTS:
        lines = [Line(label, points(job.windows, key), colour) for label, job, colour in labelled(jobs)]
        parts.append(chart(title, unit, lines, key == "grad_norm", marks))
    body = "".join([*parts, *_phases(jobs)])
    return f'<div class="grid">{body}</div>' if body else ""


def labelled(jobs: Sequence[Job]) -> list[tuple[str, Job, int]]:
    """A and B for two runs, 'run' for one, with the colour."""
    names = ("A", "B") if len(jobs) > 1 else ("run",)
    return [(name, job, colour) for colour, (name, job) in enumerate(zip(names, jobs, strict=True))]


def memory_phases(job: Job) -> str:
    """Peak memory of each phase on a GPU; '' on a CPU."""
    keys = [
        ("vision_gb", "vision"),
        ("language_gb", "language"),
        ("backward_gb", "backward"),
        ("optimizer_gb", "optimiser"),
    ]
    found = [(name, peak(job.windows, key)) for key, name in keys]
    if not any(value for _, value in found):
        return ""
    return table(["phase", "peak GB"], [(name, short(value) if value else NONE) for name, value in found])


def speed_rows(job: Job) -> list[tuple[str, float | None]]:
    """Means over a run that two runs are compared by."""
    return [
        ("training loss", number(job.last, "loss_avg")),
        ("samples / s", _mean(job.windows, "samples_per_s")),
        ("target tokens / s", _mean(job.windows, "target_tokens_per_s")),
        ("waiting for data, %", None if (share := _mean(job.windows, "data_share")) is None else 100 * share),
        ("memory, GB", peak(job.windows, "memory_gb")),
        ("time, s", job.seconds or None),
        ("windows", float(job.window)),
    ]


def _status_class(job: Job) -> str:
    return "good" if job.status != "not finished" else "warning"


def _loss(jobs: Sequence[Job], marks: Sequence[float]) -> str:
    lines = []
    for label, job, colour in labelled(jobs):
        own, is_alone = points(job.windows, "loss"), len(jobs) == 1
        if is_alone:
            lines.append(Line("window", own, colour, "faint"))
        smooth = list(zip([x for x, _ in own], smoothed([y for _, y in own]), strict=True))
        lines.append(Line("smoothed" if is_alone else f"{label} smoothed", smooth, colour))
        held_out = points(job.checks, "val_loss")
        lines.append(Line("held out" if is_alone else f"{label} held out", held_out, 1 if is_alone else colour, "dots"))
    return chart("Loss", "per target token", lines, True, marks)


def _validation(jobs: Sequence[Job]) -> Iterator[str]:
    names = dict.fromkeys(name for job in jobs for row in job.checks for name in row if name not in _NO_CURVE)
    metrics = dict.fromkeys(name.partition("/")[0] for name in names)
    for metric in metrics:
        if len(jobs) == 1:  # the data sets of a metric in one chart
            keys = [name for name in names if name.startswith(f"{metric}/")]
            keys = keys if len(keys) > 1 or metric == "val_loss" else [metric]
            if metric == "val_loss" and len(keys) < 2:
                continue
            lines = [
                Line(key.partition("/")[2] or "held out", points(jobs[0].checks, key), place % 5, "dots")
                for place, key in enumerate(keys[:5])
            ]
        elif metric == "val_loss":
            continue
        else:
            lines = [Line(label, points(job.checks, metric), colour, "dots") for label, job, colour in labelled(jobs)]
        yield chart(f"Held out: {metric.removeprefix('val_')}", "mean of a data set", lines)


def _phases(jobs: Sequence[Job]) -> list[str]:
    """Where the time of a window goes, over the whole run and as it went on."""
    parts = []
    for label, job, _ in labelled(jobs):
        means = _phase_seconds(job.windows)
        total = sum(means)
        if not total:
            continue
        bar = [(name, mean / total, f"{1000 * mean:.0f} ms") for (_, name), mean in zip(PHASES, means, strict=True)]
        title = "Time of a window" if len(jobs) == 1 else f"Time of a window, run {label}"
        parts.append(shares(f"{title}: {short(total)} s on average", bar))
    if len(jobs) == 1 and parts:
        lines = [Line(name, _phase_shares(jobs[0].windows, key), colour) for colour, (key, name) in enumerate(PHASES)]
        parts.append(chart("Step phases", "% of a window", lines))
    return parts


def _phase_seconds(rows: Rows) -> list[float]:
    """Mean seconds of each phase; a line stands for the windows since the line before."""
    sums, windows, before = [0.0] * len(PHASES), 0.0, 0.0
    for row in rows:
        weight = max(float(row["window"]) - before, 1.0)
        before = float(row["window"])
        windows += weight
        for place, (key, _) in enumerate(PHASES):
            sums[place] += weight * (number(row, key) or 0.0)
    return [value / max(windows, 1.0) for value in sums]


def _phase_shares(rows: Rows, key: str) -> list[tuple[float, float]]:
    found = []
    for row in rows:
        total = sum(number(row, name) or 0.0 for name, _ in PHASES)
        if total:
            found.append((float(row["window"]), 100 * (number(row, key) or 0.0) / total))
    return found


def _mean(rows: Rows, key: str) -> float | None:
    """Mean without the first line, which holds the start."""
    values = [value for _, value in points(rows[1:] or rows, key)]
    return sum(values) / len(values) if values else None
