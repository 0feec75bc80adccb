"""Live memory and time of a step against the size of the vocabulary and the length of answers.

    python benchmarks/memory_growth.py                       5 lengths, 3 vocabularies
    python benchmarks/memory_growth.py --quick --json out.json   the same without 128,000 words at the longest answers

One sample with a picture of 64 positions (features given) and an instruction of 20 tokens, Llama 256 x 4 of random
weights, float32, one thread: this project's step against reference_loop.py on the same weights. Losses must agree to
1e-5. Memory: peak bytes of live tensors above the built model; its slope is taken between the two longest answers.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.shared import Sizes, Words, build_model, cpu_seconds, parser, say, write_json  # noqa: E402

VOCABULARIES = (8_000, 32_000, 128_000)
ANSWERS = (20, 80, 160, 300, 1024)
QUICK_LIMIT = 128_000 * 300
"""Words x tokens of the largest cell of the quick form: beyond, the reference's way takes gigabytes."""
SIDES = ("ours", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    given = parser(__doc__, "leave 128,000 words with answers of 1024 tokens out").parse_args(argv)
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in VOCABULARIES:
            lengths = [n for n in ANSWERS if not given.quick or vocabulary * n <= QUICK_LIMIT]
            cells += measure(Path(folder) / str(vocabulary), vocabulary, lengths)
    slopes = [slope_of(cells, vocabulary) for vocabulary in VOCABULARIES]
    write_json(given.json, {"cells": cells, "slopes": slopes})
    report(cells, slopes)
    return 0


def measure(folder: Path, vocabulary: int, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """A cell per length of answer: bytes and CPU-seconds of both sides."""
    import torch

    from benchmarks.reference_loop import ReferenceLoop
    from minigpt4.common.types import IMAGE_TAG, Sample, Turn
    from minigpt4.datasets.collate import collate_packed

    model = build_model(folder, Sizes(vocab=vocabulary))
    loop = ReferenceLoop(model)
    words = Words(model.encoder.tokenizer.encode, min(VOCABULARIES))
    pictures = torch.randn(1, 3, model.cfg.image_size, model.cfg.image_size)
    with torch.no_grad():
        features = model.vision_features(pictures)
    trained = [*model.parameters(), *loop.parameters]
    cells = []
    for length in lengths:
        say(f"{vocabulary:,} words, answer of {length} tokens")
        turn = Turn(f"<Img>{IMAGE_TAG}</Img> {words.text(20)}", words.text(length - 1))  # and the end token
        (row,) = collate_packed([Sample((turn,), (features[0],), "")], model.encoder, 4096)

        def ours(row: Any = row) -> Any:
            loss = model(row).loss_sum / row.num_target_tokens
            loss.backward()
            return loss.item()

        def reference(turn: Any = turn) -> Any:
            loss = loop.loss(pictures, [turn.prompt], [turn.answer])
            loss.backward()
            return loss.item()

        cells.append({"vocabulary": vocabulary, "tokens": row.num_target_tokens, **compare(ours, reference, trained)})
    return cells


def compare(ours: Callable[[], float], reference: Callable[[], float], trained: Sequence[Any]) -> dict[str, Any]:
    """Peak bytes and CPU-seconds of both. SystemExit when their losses differ."""
    from minigpt4.tools.live_memory import LiveMemory

    figures: dict[str, Any] = {"bytes": {}, "cpu_s": {}}
    losses = []
    for side, step in zip(SIDES, (ours, reference), strict=True):
        clear(trained)
        with LiveMemory() as memory:  # warms up too
            losses.append(step())
        figures["bytes"][side] = memory.peak
        clear(trained)
        figures["cpu_s"][side] = cpu_seconds(step)
    clear(trained)
    if abs(losses[0] - losses[1]) > 1e-5:
        raise SystemExit(f"losses differ by {abs(losses[0] - losses[1]):.1e}; no figure is given")
    return figures


def clear(trained: Sequence[Any]) -> None:
    """No gradients are left of an earlier step."""
    for parameter in trained:
        parameter.grad = None


def slope_of(cells: Sequence[dict[str, Any]], vocabulary: int) -> dict[str, Any]:
    """Bytes that one more supervised token costs, between the two longest answers of ``vocabulary``."""
    before, after = sorted((c for c in cells if c["vocabulary"] == vocabulary), key=lambda c: c["tokens"])[-2:]
    more = after["tokens"] - before["tokens"]
    found = {side: (after["bytes"][side] - before["bytes"][side]) / more for side in SIDES}
    return {"vocabulary": vocabulary, "from": before["tokens"], "to": after["tokens"], **found}


def report(cells: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]]) -> None:
    """The figures as lines."""
    print("   words   tokens   live MB ours   reference   ratio   CPU-s ours   reference   ratio")
    for cell in cells:
        (size, other), (spent, theirs) = ([cell[key][side] for side in SIDES] for key in ("bytes", "cpu_s"))
        print(
            f"{cell['vocabulary']:>8,} {cell['tokens']:>8} {size / 1e6:>14.1f} {other / 1e6:>11.1f} "
            f"{size / other:>7.3f} {spent:>12.2f} {theirs:>11.2f} {spent / theirs:>7.3f}"
        )
    for row in slopes:
        print(
            f"{row['vocabulary']:>8,} words: a supervised token costs {row['ours'] / 1e3:,.0f} kB, "
            f"the reference's way {row['reference'] / 1e3:,.0f} kB ({row['from']} to {row['to']} tokens)"
        )


if __name__ == "__main__":
    sys.exit(main())
