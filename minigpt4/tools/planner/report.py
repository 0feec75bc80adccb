"""A plan as text: tables on a terminal, aligned columns elsewhere; and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from minigpt4.tools.planner.estimate import CARDS, Estimate, Planner, usable_bytes
from minigpt4.tools.planner.proposal import Proposal
from minigpt4.tools.planner.reference import Item
from minigpt4.tools.planner.skeleton import POLICIES, Variant
from minigpt4.tools.planner.split import find_units
from minigpt4.tools.planner.workload import Window

TIGHT = "; rows of changing length may fragment the memory"


@dataclass(frozen=True)
class Table:
    """Cells are text; ``right``: numbers of the columns that are aligned at the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


@dataclass
class Report:
    """Sections in the order of printing, and the same facts for programs."""

    sections: list[Table | str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def show(self, is_terminal: bool) -> None:
        """Print every section."""
        if not is_terminal:
            print("\n\n".join(item if isinstance(item, str) else plain(item) for item in self.sections))
            return
        from rich.console import Console

        console = Console(highlight=False)
        for item in self.sections:
            console.print(item if isinstance(item, str) else rich_table(item), soft_wrap=isinstance(item, str))
            console.print()


def start(config: str, planner: Planner, window: Window, estimate: Estimate) -> Report:
    """What every plan says."""
    result = Report([f"Plan of {config}: {planner.cfg.model.arch}", f"Batch: {window.text}"])
    result.sections += [parts_table(estimate), memory_table(estimate), policies_table(planner, estimate)]
    if planner.on_gpu:
        result.sections.append(cards_table(planner, estimate))
    if estimate.variant.shards > 1:
        result.sections.append(split_text(planner, estimate))
    elif planner.cfg.run.parallel == "fsdp":
        result.sections.append("run.parallel fsdp splits nothing on one GPU; --gpus N says how many there are.")
    result.facts = {"config": config, "window": asdict(window), **estimate_facts(estimate)}
    result.facts["per_sample"] = {
        policy: dict(
            zip(("first", "further"), planner.line(with_recompute(estimate, policy), estimate.row), strict=True)
        )
        for policy in POLICIES
    }
    return result


def with_recompute(estimate: Estimate, policy: str) -> Variant:
    """The estimate's variant under another recompute policy."""
    return replace(estimate.variant, recompute=policy)


def add_proposals(report: Report, card_gb: float, estimate: Estimate, proposals: Sequence[Proposal]) -> None:
    """Whether the run fits the card, and what to change if not."""
    report.sections.append(card_text(proposals, estimate, card_gb))
    report.facts["gpu"] = card_gb
    report.facts["proposals"] = [
        {"changes": item.changes, "options": item.options, **estimate_facts(item.estimate)} for item in proposals
    ]


def add_larger(report: Report, larger: Proposal | None) -> None:
    """Fewer rows per optimiser step, where the card has room for larger ones."""
    report.facts["larger"] = None
    if larger is not None:
        size = gigabytes(larger.estimate.total)
        lines = [f"Room for larger rows, the same samples per optimiser step: {larger.changes[0]} ({size})"]
        report.sections.append("\n".join([*lines, f"    --options {' '.join(larger.options)}"]))
        facts = estimate_facts(larger.estimate)
        report.facts["larger"] = {"changes": larger.changes, "options": larger.options, **facts}


def plain(table: Table) -> str:
    """Aligned columns below the title."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(table.columns))]
    shown = []
    for line in lines:
        cells = [
            cell.rjust(width) if number in table.right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append("  " + "  ".join(cells).rstrip())
    return "\n".join([table.title, *shown])


def rich_table(table: Table) -> Any:
    """The same for rich."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    result = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        result.add_column(column, justify="right" if number in table.right else "left")
    for row in table.rows:
        result.add_row(*row)
    return result


def gigabytes(size: float) -> str:
    """Two decimals of GB; what would be nothing there, in a smaller unit."""
    if size >= 1e7:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def parts_table(estimate: Estimate) -> Table:
    """Parameters and bytes by part and dtype."""
    rows = [
        (part.name, f"{part.count:,}", part.dtype, gigabytes(part.bytes), "trains" if part.trains else "frozen")
        for part in estimate.parts
        if part.count
    ]
    count, trained = (sum(p.count for p in estimate.parts if p.trains or every) for every in (True, False))
    rows.append(("all", f"{count:,}", "", gigabytes(estimate.weights), f"{trained:,} train"))
    return Table("Weights", ("part", "parameters", "dtype", "bytes", ""), tuple(rows), (1, 3))


def memory_table(estimate: Estimate) -> Table:
    """The account of the fullest moment."""
    step = estimate.step
    is_split = estimate.variant.shards > 1
    part = "this GPU's part" if is_split else ""
    rows = [("weights", gigabytes(estimate.weights), part)]
    moments = "AdamW: two float32 moments of what trains"
    rows.append(("optimiser", gigabytes(step.moments), f"{moments}, {part}" if part else moments))
    if step.gradients:
        whole = "whole on every GPU, " if is_split else ""
        rows.append(("gradients", gigabytes(step.gradients), f"float32, {whole}kept from earlier rows of the window"))
    rows.append(("batch", gigabytes(step.inputs), "images (or their features) and ids on the device"))
    gathered = "layers that are gathered, " if is_split else ""
    rows.append(
        ("activations", gigabytes(step.activations), f"{gathered}and what else the step holds at its fullest moment")
    )
    if estimate.context:
        rows.append(("CUDA context", gigabytes(estimate.context), "assumed, 0.4 to 0.8 GB; PyTorch does not count it"))
    rows.append(("peak", gigabytes(estimate.total), "predicted, per GPU"))
    if estimate.filling:
        filling = estimate.filling + estimate.context
        rows.insert(
            -1, ("filling the cache", gigabytes(filling), "before training: tower, a batch of pictures; no step")
        )
    title = f"Memory: {estimate.variant.text}; {row_text(estimate)}"
    return Table(title, ("", "bytes", ""), tuple(rows), (1,))


def row_text(estimate: Estimate) -> str:
    """The row that was traced."""
    row = estimate.row
    samples = "1 sample" if row.samples == 1 else f"{row.samples} samples"
    return f"{'packed row' if row.packed else 'micro-batch'} of {samples} of {row.shape.text}; lengths: {row.source}"


def split_text(planner: Planner, estimate: Estimate) -> str:
    """What fsdp gathers, and what its start needs."""
    root, *others = (unit.gathered for unit in find_units(planner.skeleton(estimate.variant), estimate.variant.shards))
    whole = ""
    if estimate.step.gradients:
        whole = " A window of one row keeps no whole gradients: run.accum_grad_iters=1 and larger batches do as much."
    return (
        f"run.parallel fsdp, split over {estimate.variant.shards} of {planner.ranks.count} GPUs: embedding, head, "
        f"projection and norms ({gigabytes(root)}) are whole during a row, two units of at most "
        f"{gigabytes(max(others))} are there at a time. While it starts, the processes of a node build "
        f"{planner.ranks.on_a_node} models in host memory: {gigabytes(estimate.host)}.{whole}"
    )


def auto_cache_text(passes: float) -> str:
    """Why the plan caches, and when the run would not."""
    return (
        f"model.cache_vision auto: the run makes about {passes:.1f} passes over the data, so features are planned. "
        "The run keeps pixels where that needs over half of the free disk, or a data set does not know its pictures."
    )


def policies_table(planner: Planner, estimate: Estimate) -> Table:
    """Bytes per sample with and without recomputation."""
    rows = []
    for policy in POLICIES:
        variant = with_recompute(estimate, policy)
        first, further = planner.line(variant, estimate.row)
        held = planner.estimate(variant, estimate.row.with_samples(1)).step.activations
        rows.append((policy, gigabytes(held), gigabytes(further), gigabytes(first)))
    columns = ("recompute", "first sample", "each further", "peak with one sample")
    title = f"Activations per sample of {estimate.row.shape.positions:,} positions"
    return Table(title, columns, tuple(rows), (1, 2, 3))


def cards_table(planner: Planner, estimate: Estimate) -> Table:
    """Which cards hold the run as configured, and how many samples a row of theirs could hold."""
    rows = []
    for card in CARDS:
        counts = []
        for policy in POLICIES:
            most = planner.most_samples(with_recompute(estimate, policy), estimate.row, usable_bytes(card))
            counts.append(str(most) if most else "-")
        rows.append((f"{card} GB", gigabytes(usable_bytes(card)), estimate.verdict(card), *counts))
    columns = ("card", "usable", "this run", "samples per row, recompute none", *POLICIES[1:])
    return Table("Cards", columns, tuple(rows), (0, 1, 3, 4, 5))


def card_text(proposals: Sequence[Proposal], estimate: Estimate, card_gb: float) -> str:
    """What to change, ready to be typed."""
    verdict = estimate.verdict(card_gb)
    room = f"{gigabytes(estimate.total)} wanted, {gigabytes(usable_bytes(card_gb))} usable"
    if verdict != "no":
        return f"{card_gb:g} GB card: {verdict} ({room}){TIGHT if verdict == 'tight' else ''}"
    lines = [f"{card_gb:g} GB card: does not fit ({room})"]
    if not proposals:
        return f"{lines[0]}, and no change of rows, precision, quantisation, recompute, cache or fsdp makes it fit"
    for number, item in enumerate(proposals):
        word = "The smallest change that fits" if number == 0 else "or"
        found = f"{gigabytes(item.estimate.total)}, {item.estimate.verdict(card_gb)}"
        lines += [f"  {word}: {'; '.join(item.changes)} ({found})", f"    --options {' '.join(item.options)}"]
    return "\n".join(lines)


def reference_table(kind: str, items: Sequence[Item], row: str) -> Table:
    """The account of a published loop."""
    rows = [(item.name, gigabytes(item.bytes), item.how) for item in items]
    rows.append(("peak", gigabytes(sum(item.bytes for item in items)), ""))
    return Table(f"Memory of the {kind} loop, by formula: {row}", ("", "bytes", "how"), tuple(rows), (1,))


def probe_text(estimate: Estimate, measured: int, has_weights: bool) -> str:
    """Prediction and measurement, without the CUDA context that PyTorch does not count."""
    weights = "the run's weights" if has_weights else "random weights"
    return (
        f"Probe ({weights}, two optimiser steps): predicted {gigabytes(estimate.allocated)}, measured "
        f"{gigabytes(measured)}, difference {100 * (estimate.allocated / measured - 1):+.1f} %"
    )


def estimate_facts(estimate: Estimate) -> dict[str, Any]:
    """An estimate for programs; bytes throughout."""
    return {
        "variant": asdict(estimate.variant),
        "row": {
            "samples": estimate.row.samples,
            "positions": estimate.row.positions,
            "packed": estimate.row.packed,
            "sample": asdict(estimate.row.shape),
            "lengths": estimate.row.source,
        },
        "parts": [asdict(part) for part in estimate.parts],
        "weights": estimate.weights,
        **asdict(estimate.step),
        "context": estimate.context,
        "allocated": estimate.allocated,
        "total": estimate.total,
        "filling": estimate.filling,
        "host": estimate.host,
        "cards": {str(card): estimate.verdict(card) for card in CARDS},
    }
