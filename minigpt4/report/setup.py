"""The part of a report about what a run was made of: data, configuration, versions, command, loaded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from html import escape
from typing import Any

from minigpt4.common import schema
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.report.html import fold, table
from minigpt4.report.job import Job
from minigpt4.report.numbers import NONE, number, percent, short
from minigpt4.report.training import bad_records

_ABSENT = "(absent)"


def data_sets(job: Job) -> str:
    """Size, share and fingerprint of each, and records that were passed over."""
    found = job.manifest.get("data")
    sets = (
        {str(name): facts for name, facts in found.items() if isinstance(facts, dict)}
        if isinstance(found, dict)
        else {}
    )
    if not sets:
        return ""
    ratios = {name: number(facts, "sample_ratio") for name, facts in sets.items()}
    total = sum(ratio or 0.0 for ratio in ratios.values())
    asked = {item.name: len(item.rows) for item in job.answers}
    rows = []
    for name, facts in sets.items():
        ratio = ratios[name]
        rows.append(
            [
                escape(name),
                f"<code class=n>{escape(str(facts.get('fingerprint', ''))[:12])}</code>",
                short(number(facts, "samples")),
                short(ratio),
                percent(ratio / total) if ratio is not None and total else NONE,
                short(number(facts, "batch_size")),
                short(asked.get(name)),
            ]
        )
    header = ["data set", "fingerprint", "samples", "ratio", "share of draws", "batch", "held-out answers"]
    return table(header, rows, texts=2) + _bad(job)


def settings(job: Job) -> str:
    """What differs from the defaults, then the whole file folded."""
    if not job.config:
        return ""
    changed = changes(job.config)
    rows = [[f"<code>{escape(key)}</code>", _value(value), _value(default)] for key, value, default in changed]
    note = (
        '<p class="dim small">Settings that differ from the defaults of their classes; the others are in the file.</p>'
    )
    whole = fold("the whole configuration", f"<pre>{escape(job.config_text)}</pre>")
    return note + table(["setting", "value", "default"], rows, texts=3) + whole


def settings_difference(first: Job, second: Job) -> str:
    """Settings in which two runs differ."""
    before, after = flat(first.config), flat(second.config)
    keys = [key for key in {**before, **after} if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    rows = [
        [f"<code>{escape(key)}</code>", _value(before.get(key, _ABSENT)), _value(after.get(key, _ABSENT))]
        for key in keys
    ]
    if not rows:
        return '<p class="dim">The two configurations are equal.</p>'
    return table(["setting", "A", "B"], rows, texts=3)


def origin(job: Job) -> str:
    """Command, code, versions, and what loading the weights did."""
    manifest = job.manifest
    earlier = manifest.get("earlier_starts")
    starts = [item for item in earlier if isinstance(item, dict)] if isinstance(earlier, list) else []
    commands = [*starts, manifest] if manifest else []
    parts = [_start(start) for start in commands]
    versions = manifest.get("versions")
    if isinstance(versions, dict):
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(f'<p class="small">{escape(listed)}; device {escape(str(manifest.get("device", "")))}</p>')
    return "".join(parts) + _loads(manifest.get("load_report"))


def ranks(start: Mapping[str, Any]) -> str:
    """'1 rank', '8 ranks'."""
    count = start.get("world_size", 1)
    return "1 rank" if count == 1 else f"{count} ranks"


def changes(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value and default of every setting that is not its default, in the order of the file."""
    usual = flat(defaults(config))
    given = flat(config)
    found = [(key, value, usual.get(key, _ABSENT)) for key, value in given.items() if value != usual.get(key, _ABSENT)]
    # an empty mapping that got keys: its default would be listed as "(absent)" once per key
    return [(key, value, "" if default == _ABSENT else default) for key, value, default in found if value != {}]


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every section of ``config`` would hold if nothing was written, by the classes its names select.

    The classes must be registered (``catalog.load``); for an unknown name those that all share count.
    """
    model, run, sets = (config.get(key) for key in ("model", "run", "datasets"))
    blocks = {str(name): block for name, block in sets.items()} if isinstance(sets, Mapping) else {}
    return {
        "model": _default("model", model, "arch", schema.ModelConfig),
        "datasets": {
            name: _default("builder", block, "builder", schema.DatasetConfig) for name, block in blocks.items()
        },
        "run": _default("runner", run, "runner", schema.RunConfig),
    }


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, 'run.valid.metrics' -> value; empty ones stay as they are."""
    if not isinstance(value, Mapping) or (not value and prefix):
        return {prefix: value}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        result.update(flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return result


def _default(kind: str, block: Any, key: str, fallback: type[Any]) -> dict[str, Any]:
    name = block.get(key) if isinstance(block, Mapping) else None
    try:
        cls = registry.get(kind, str(name)).Config
    except ConfigError:
        cls = fallback
    usual = cls()
    return asdict(usual) if is_dataclass(usual) and not isinstance(usual, type) else {}


def _value(value: Any) -> str:
    return f"<code>{escape(str(value))}</code>"


def _start(start: Mapping[str, Any]) -> str:
    """When, from where and how a run was started."""
    facts = [str(start.get("started", "")), ranks(start)]
    facts.append(f"code {start.get('git') or 'outside a repository'}")
    facts += [
        f"{word} {start[key]}"
        for key, word in (("resumed_from", "resumed from"), ("weights_from", "weights from"))
        if start.get(key)
    ]
    command = escape(str(start.get("command", "")))
    return f'<p class="small dim">{escape(", ".join(facts))}</p><pre>{command}</pre>'


def _bad(job: Job) -> str:
    parts = []
    for name, facts in bad_records(job).items():
        examples = facts.get("examples")
        lines = "".join(
            f"<li><code>{escape(str(text))}</code></li>" for text in (examples if isinstance(examples, list) else [])
        )
        parts.append(
            fold(f"{escape(name)}: {escape(str(facts.get('count')))} records passed over", f"<ul>{lines}</ul>")
        )
    return "".join(parts)


def _loads(reports: Any) -> str:
    rows: list[Sequence[str]] = []
    for report in reports if isinstance(reports, list) else []:
        parts = report.get("parts") if isinstance(report, dict) else None
        for part, counts in parts.items() if isinstance(parts, dict) else ():
            cells = [counts.get(kind) if isinstance(counts, dict) else None for kind in _KINDS]
            shown = [escape(str(cell)) if cell else NONE for cell in cells]
            rows.append([f"<code>{escape(str(report.get('source', '')))}</code>", escape(str(part)), *shown])
    if not rows:
        return ""
    return fold("weights: tensors by part", table(["file", "part", *_KINDS], rows, texts=2), is_open=True)


_KINDS = ("loaded", "missing", "unexpected", "mismatched", "ignored")
