"""The reference's wastes taken away one at a time: CPU-seconds and live memory of a step, rung by rung.

    python benchmarks/wastes.py                        3 rounds of 4 micro-batches
    python benchmarks/wastes.py --quick --json out.json   1 round of 1 micro-batch

The mid-size model and the samples of train_step.py, float32, one thread, all rungs in one process in turning order.
Every rung is the one before it (recompute and cached features: the one before those) with one real switch changed, and
computes the same loss to 1e-5, or no figure is given. Memory: peak bytes of live tensors above the built models, the
heaviest micro-batch. The reference's first wastes need a GPU to be seen and have no rung: README.md names them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.shared import WORKLOAD, cpu_seconds, parser, say, write_json  # noqa: E402

Step = Callable[[int], float]
"""Number of a micro-batch -> its mean loss; gradients are added."""


@dataclass(frozen=True)
class Rung:
    """One row of the ladder. before: the rung it is compared with."""

    name: str
    before: str
    step: Step
    parameters: Sequence[Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    given = parser(__doc__, "1 round of 1 micro-batch").parse_args(argv)
    rounds, batches = (1, 1) if given.quick else (3, 4)
    with tempfile.TemporaryDirectory() as folder:
        say("building random models")
        rungs = ladder(Path(folder), batches)
        figures: dict[str, Any] = {"rungs": measure(rungs, rounds, batches), "rounds": rounds, "micro_batches": batches}
    write_json(given.json, figures)
    report(figures["rungs"])
    return 0


def ladder(folder: Path, batches: int) -> list[Rung]:
    """All rungs over three models of equal weights: stock layers, lean layers, lean layers that recompute."""
    import torch

    from benchmarks.reference_loop import ReferenceLoop
    from benchmarks.train_step import build_language_model
    from benchmarks.train_step_worker import build_model, our_step, random_images, reference_step
    from minigpt4.models import base_model
    from minigpt4.models.recompute import recompute_mlps

    build_language_model(folder)
    samples = json.loads((WORKLOAD / "samples.json").read_text())[:batches]
    images = random_images()
    with mock.patch.object(base_model, "use_lean_layers", lambda llm: None):  # the libraries' own layers
        stock = build_model(folder).train()
    lean, whole, mlps = (build_model(folder, recompute=flag).train() for flag in (False, True, False))
    recompute_mlps(mlps.llama_model.get_base_model())
    loop = ReferenceLoop(build_model(folder).train())

    def reference(attention: str, use_cache: bool) -> Step:
        step = reference_step(loop, images, samples)

        def switched(number: int) -> float:
            loop.set_switches(attention, use_cache)
            return step(number)

        return switched

    with torch.no_grad():
        features = lean.vision_features(images)
    weights = {model: [p for p in model.parameters() if p.requires_grad] for model in (stock, lean, whole, mlps)}

    def ours(name: str, before: str, model: Any, step: Step | None = None, pictures: Any = images) -> Rung:
        return Rung(name, before, step or our_step(model, pictures, samples), weights[model])

    def with_whole_layers(model: Any) -> Step:
        step = our_step(model, images, samples)

        def switched(number: int) -> float:
            with mock.patch.object(model, "ends_narrow", False):
                return step(number)

        return switched

    first, plain, fused, packed = (
        "the reference's way",
        "no key-value cache",
        "SDPA in both transformers",
        "packed rows",
    )
    chosen, headed, light = "logits of supervised positions", "gradient of the head in the forward", "lean LoRA and MLP"
    narrow = "last layer at supervised positions"
    return [
        Rung(first, "", reference("eager", True), loop.parameters),
        Rung(plain, first, reference("eager", False), loop.parameters),
        Rung(fused, plain, reference("sdpa", False), loop.parameters),
        ours(packed, fused, stock, packed_step(stock, images, samples, every_position_loss)),
        ours(chosen, packed, stock, packed_step(stock, images, samples, chosen_loss)),
        ours(headed, chosen, stock, with_whole_layers(stock)),
        ours(light, headed, lean, with_whole_layers(lean)),
        ours(narrow, light, lean),
        ours("MLPs recomputed", narrow, mlps),
        ours("layers recomputed", narrow, whole),
        ours("cached vision features", narrow, lean, pictures=features),
    ]


def packed_step(model: Any, images: Any, samples: Sequence[Any], loss_of: Callable[[Any, Any, Any], Any]) -> Step:
    """Packed rows of this project with another loss than its own."""
    from benchmarks.train_step_worker import as_rows

    windows = [as_rows(model, images, batch) for batch in samples]

    def step(number: int) -> float:
        rows = windows[number]
        count = sum(row.num_target_tokens for row in rows)
        total = 0.0
        for row in rows:
            embeddings = model.embed(row.input_ids, row.images, row.num_image_positions, row.image_order)
            hidden = model.hidden_states(embeddings, row.position_ids, row.lengths)
            loss = loss_of(model, hidden, row.labels) / count
            loss.backward()
            total += loss.item()
        return total

    return step


def every_position_loss(model: Any, hidden: Any, labels: Any) -> Any:
    """Summed loss over logits of all positions, as the reference has them."""
    from torch.nn import functional

    from minigpt4.models.llm import causal_lm

    logits = causal_lm(model.llama_model).get_output_embeddings()(hidden).float()
    return functional.cross_entropy(logits.flatten(0, 1), next_labels(labels).flatten(), reduction="sum")


def chosen_loss(model: Any, hidden: Any, labels: Any) -> Any:
    """The same over logits of supervised positions alone."""
    from torch.nn import functional

    from minigpt4.common.types import IGNORE_INDEX
    from minigpt4.models.llm import causal_lm

    targets = next_labels(labels)
    kept = targets != IGNORE_INDEX
    logits = causal_lm(model.llama_model).get_output_embeddings()(hidden[kept]).float()
    return functional.cross_entropy(logits, targets[kept], reduction="sum")


def next_labels(labels: Any) -> Any:
    """labels [R, T] -> what each position is to predict [R, T]."""
    from torch.nn import functional

    from minigpt4.common.types import IGNORE_INDEX

    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def measure(rungs: Sequence[Rung], rounds: int, batches: int) -> list[dict[str, Any]]:
    """CPU-seconds per micro-batch (medians over rounds), live bytes, and ratios to the rung before and to the first."""
    seconds: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    losses: dict[str, list[float]] = {rung.name: [] for rung in rungs}
    live: dict[str, int] = {}
    for rung in rungs:  # warms up too
        say(f"memory: {rung.name}")
        live[rung.name] = max(peak_bytes(rung, number) for number in range(batches))
    for number in range(rounds):
        for rung in rungs[:: -1 if number % 2 else 1]:
            say(f"round {number + 1}/{rounds}: {rung.name}")
            clear(rung)
            found: list[float] = []
            spent = cpu_seconds(lambda rung=rung, found=found: found.extend(map(rung.step, range(batches))))
            seconds[rung.name].append(spent / batches)
            losses[rung.name] = found
    first = rungs[0].name
    difference = max(abs(a - b) for row in losses.values() for a, b in zip(row, losses[first], strict=True))
    if difference > 1e-5:
        raise SystemExit(f"losses of the rungs differ by {difference:.1e}; no figure is given")
    cpu = {name: statistics.median(row) for name, row in seconds.items()}
    return [
        {
            "name": rung.name,
            "before": rung.before,
            "cpu_s": cpu[rung.name],
            "live_bytes": live[rung.name],
            "time_step": cpu[rung.name] / cpu[rung.before or first],
            "memory_step": live[rung.name] / live[rung.before or first],
            "time_ratio": cpu[rung.name] / cpu[first],
            "memory_ratio": live[rung.name] / live[first],
            "loss_difference": difference,
        }
        for rung in rungs
    ]


def clear(rung: Rung) -> None:
    """No gradients are left of an earlier step."""
    for parameter in rung.parameters:
        parameter.grad = None


def peak_bytes(rung: Rung, number: int) -> int:
    """Most bytes of live tensors during one micro-batch, gradients included, weights not."""
    from minigpt4.tools.live_memory import LiveMemory

    clear(rung)
    with LiveMemory() as memory:
        rung.step(number)
    return memory.peak


def report(rows: Sequence[dict[str, Any]]) -> None:
    """The ladder as lines."""
    print(f"losses agree to {rows[0]['loss_difference']:.1e}")
    print(f"{'':38}{'CPU-s':>7}{'of before':>11}{'of first':>10}{'live MB':>10}{'of before':>11}{'of first':>10}")
    for row in rows:
        print(
            f"{row['name']:38}{row['cpu_s']:7.2f}{row['time_step']:11.3f}{row['time_ratio']:10.3f}"
            f"{row['live_bytes'] / 1e6:10.0f}{row['memory_step']:11.3f}{row['memory_ratio']:10.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
