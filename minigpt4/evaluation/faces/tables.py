"""The scores as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from minigpt4.evaluation.faces.compare import Difference
from minigpt4.evaluation.faces.run import section_modes

_NONE = "-"
_WIDE = 120
_SHOWN = 6
NOTE = (
    "Percent, with 95 % intervals. Answers without exactly one label are wrong. blank: the same model, a grey picture."
)


def show_results(results: Mapping[str, Any], console: Console) -> None:
    """One table of closed questions, one of texts, one of groups; only those that have rows."""
    console = _unfolded(console)
    rows = section_modes(results)
    titles = ("n", "accuracy", "balanced", "F1", "invalid", "refused", "majority", "blank")
    closed = _table("section", "mode", *titles, texts=2)
    text = _table("section", "n", "ROUGE-L", "blank", "attributes named", "blank", "refused")
    for mode, name, scores in rows:
        if scores.get("kind") == "text":
            _add_text(text, name, scores)
        elif scores["n"]:
            _add_closed(closed, mode, name, scores)
    for table in (closed, text, _groups(results)):
        if table.row_count:
            console.print(table)
    if errors := sum(scores["errors"] for _, _, scores in rows):
        console.print(f"questions without an answer, in no score: {errors} (see 'error' in the predictions)")
    for note in results["notes"]:
        console.print(f"note: {note}", highlight=False)
    console.print(NOTE, highlight=False)


def show_differences(mode: str, found: Sequence[Difference], console: Console) -> None:
    """What changed against the other run; a star where the interval leaves out zero."""
    console = _unfolded(console)
    table = _table("section", "score", "n", "difference, points", texts=2)
    for item in found:
        star = " *" if item.found.excludes_zero else ""
        shown = f"{100 * item.found.value:+.1f} ({100 * item.found.low:+.1f} to {100 * item.found.high:+.1f}){star}"
        table.add_row(item.section, item.score.replace("_", " "), f"{item.n:,}", shown)
    table.title = f"against the other run, {mode}; * = more than chance at 95 %"
    console.print(table)


def _unfolded(console: Console) -> Console:
    """A console wide enough for the tables where no terminal sets the width."""
    return console if console.is_terminal else Console(file=console.file, width=max(console.width, _WIDE))


def _table(*titles: str, texts: int = 1) -> Table:
    table = Table(box=box.SIMPLE)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < texts else "right", no_wrap=number >= texts)
    return table


def _add_closed(table: Table, mode: str, name: str, scores: Mapping[str, Any]) -> None:
    baselines = scores["baselines"]
    balanced, macro = (_value(scores.get(key)) for key in ("balanced_accuracy", "macro_f1"))
    shares = (_percent(scores[key]) for key in ("invalid", "refusal"))
    compared = (_percent(baselines.get(key)) for key in ("majority", "blank"))
    table.add_row(name, mode, f"{scores['n']:,}", _interval(scores["accuracy"]), balanced, macro, *shares, *compared)


def _add_text(table: Table, name: str, scores: Mapping[str, Any]) -> None:
    baselines = scores.get("baselines", {})
    cells = []
    for key in ("rouge_l", "attribute_recall"):
        cells += [_interval(scores[key]) if key in scores else _NONE, _percent(baselines.get(f"blank_{key}"))]
    table.add_row(name, f"{scores['n']:,}", *cells, _percent(scores["refusal"]))


def _groups(results: Mapping[str, Any]) -> Table:
    table = _table("section", "mode", "by", "lowest", "highest", "gap", "chance", "too small", texts=5)
    for mode, found in results["modes"].items():
        for section, columns in found.get("groups", {}).items():
            for column, scores in columns.items():
                _add_groups(table, (section, mode, column), scores)
    return table


def _add_groups(table: Table, names: tuple[str, str, str], scores: Mapping[str, Any]) -> None:
    by_value = sorted(scores["groups"].items(), key=lambda item: item[1]["value"])
    ends = [f"{name} {_percent(group['value'])} (n={group['n']:,})" for name, group in by_value]
    few = [f"{name} ({n})" for name, n in scores["too_small"].items()]
    small = ", ".join(few[:_SHOWN] + [f"{len(few) - _SHOWN} more"] * (len(few) > _SHOWN)) or _NONE
    if scores["gap"] is None:
        table.add_row(*names, *(ends[:1] or [_NONE]), _NONE, _NONE, _NONE, small)
    else:
        chance = f"{scores['chance']:.3f}"
        table.add_row(*names, ends[0], ends[-1], _interval(scores["gap"]), chance, small)


def _value(found: Mapping[str, Any] | None) -> str:
    return _NONE if found is None else _percent(found["value"])


def _interval(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return _NONE
    ends = [_NONE if found[key] is None else f"{100 * found[key]:.1f}" for key in ("low", "high")]
    return f"{100 * found['value']:.1f} ({ends[0]} to {ends[1]})"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"
