"""One training step, this project's way against the reference's way, on the same random weights and samples.

    python benchmarks/train_step.py                       alternating rounds, gated
    python benchmarks/train_step.py --quick --json out.json

Mid-size MiniGPT-v2 (EVA-like 256 x 6, Llama 512 x 8 with 32,000 words, LoRA r=16) on the CPU, float32, one thread.
Nothing is printed before losses of every micro-batch agree to 1e-5 and gradient norms to 1e-4. Every variant runs in a
process of its own. Time: CPU-seconds per micro-batch of four samples (forward, backward, its share of the update).
Memory: peak bytes of live tensors above the built model (minigpt4/tools/live_memory.py). README.md: results, limits.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.shared import environment, parser, say, write_json  # noqa: E402

VARIANTS = {
    "reference": "the reference's way",
    "ours": "this project's way",
    "recompute": "ours, layers computed twice (use_grad_checkpoint_llm)",
    "cached": "ours, vision features given",
    "reference_recompute": "the reference's way with use_grad_checkpoint_llm",
}
PRODUCTS = {"reference": 130, "ours": 70, "recompute": 95, "cached": 60, "reference_recompute": 165}
"""Cost of a micro-batch in 1024^3 products, for the estimate of the duration only."""
GATES = {
    "time_ratio": 0.60,
    "against_published": 0.52,
    "extra_memory_ratio": 0.35,
    "recompute_memory_ratio": 0.12,
}
PUBLISHED_CPU_S = 5.05
PUBLISHED_PRODUCT_S = 2 * 0.017
"""The published reference's CPU-seconds per micro-batch, and what a product takes on its machine: 0.017 s on two
threads, so at most 0.034 on one. At most: its cost in products is then at least what is used here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 1 when a gate is missed in the gated mode, 130 when stopped."""
    options = parser(__doc__, "one round of 4 micro-batches, ungated")
    options.add_argument("--rounds", type=int, default=3, help="alternating rounds of 16 micro-batches (default 3)")
    given = options.parse_args(argv)
    if given.rounds < 1:
        options.error("--rounds must be at least 1")
    if given.json and not given.json.resolve().parent.is_dir():
        options.error(f"--json: there is no folder {given.json.resolve().parent}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does: nothing stays behind
    try:
        runs = measure(*((1, 4) if given.quick else (given.rounds, 16)))
    except KeyboardInterrupt:
        print("\nstopped; temporary files are removed", file=sys.stderr)
        return 130
    figures = summarise(runs)
    write_json(given.json, {**figures, "runs": runs})
    report(figures)
    missed = [key for key, limit in GATES.items() if figures[key] > limit]
    for key in missed:
        print(f"gate missed: {key} {figures[key]:.3f} > {GATES[key]}" + (" (not counted: --quick)" * given.quick))
    return 1 if missed and not given.quick else 0


def measure(rounds: int, batches: int) -> dict[str, list[dict[str, Any]]]:
    """Figures of every run, by variant. Order turns round every other round; memory is counted in the first."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        say("building a random language model")
        product = build_language_model(Path(folder))
        work = rounds * (batches + 1) + 2  # a warm-up each, two micro-batches for memory
        minutes = (product * work * sum(PRODUCTS.values()) + 10 * rounds * len(VARIANTS)) / 60
        say(f"{len(VARIANTS)} variants x {rounds} rounds: about {minutes:.0f} minutes of one idle core")
        for number in range(rounds):
            for name in list(VARIANTS)[:: -1 if number % 2 else 1]:
                say(f"round {number + 1}/{rounds}: {VARIANTS[name]}")
                runs[name].append(start(name, folder, batches, with_memory=number == 0))
    return runs


def start(variant: str, folder: str, batches: int, with_memory: bool) -> dict[str, Any]:
    """One variant in a fresh process with one thread."""
    command = [sys.executable, str(HERE / "train_step_worker.py"), variant, folder, str(batches)]
    command += ["--memory"] * with_memory
    # A session of its own: Ctrl-C reaches this process alone, which ends the run.
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, text=True, check=False, start_new_session=True
    )
    if done.returncode:
        raise SystemExit(f"the run of '{variant}' failed; its error is above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def build_language_model(folder: Path) -> float:
    """A random Llama of the recipe's sizes with the workload's tokenizer, as a Hugging Face folder.

    Returns the CPU-seconds of a 1024^3 product here.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from benchmarks.train_step_worker import product_seconds, recipe

    shape = recipe()["shape"]
    torch.set_num_threads(1)
    torch.manual_seed(shape["seed"])
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["inter"],
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(HERE / "workload" / name, folder / name)
    return min(product_seconds() for _ in range(5))


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds and their ratios. SystemExit when the loops do not compute the same thing."""
    reference = runs["reference"][0]
    losses, norms = [], []
    for run in (run for name in VARIANTS for run in runs[name]):
        losses += [abs(a - b) for a, b in zip(run["losses"], reference["losses"], strict=True)]
        norms.append(abs(run["gradient_norm"] / reference["gradient_norm"] - 1))
    if max(losses) > 1e-5 or max(norms) > 1e-4:
        raise SystemExit(f"losses differ by {max(losses):.1e}, gradient norms by {max(norms):.1e}: no figure is given")
    cpu = {name: statistics.median(run["cpu_s"] for run in runs[name]) for name in VARIANTS}
    in_products = {name: statistics.median(run["cpu_s"] / run["product_s"] for run in runs[name]) for name in VARIANTS}
    live = {name: runs[name][0]["live_bytes"] for name in VARIANTS}
    published = PUBLISHED_CPU_S / PUBLISHED_PRODUCT_S
    return {
        "time_ratio": ratio(runs, "ours"),
        "extra_memory_ratio": live["ours"] / live["reference"],
        "recompute_memory_ratio": live["recompute"] / live["reference"],
        "against_published": in_products["ours"] / published,
        "cached_time_ratio": ratio(runs, "cached"),
        "recompute_time_ratio": ratio(runs, "recompute"),
        "reference_against_published": in_products["reference"] / published,
        "cpu_s": cpu,
        "cpu_s_spread": {
            name: [f(run["cpu_s"] for run in runs[name]) / cpu[name] for f in (min, max)] for name in VARIANTS
        },
        "live_bytes": live,
        "rss_bytes": {name: max(run["rss_bytes"] for run in runs[name]) for name in VARIANTS},
        "product_s": statistics.median(run["product_s"] for name in VARIANTS for run in runs[name]),
        "loss_difference": max(losses),
        "gradient_norm_difference": max(norms),
        "mean_loss": statistics.mean(reference["losses"]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}",
    }


def ratio(runs: dict[str, list[dict[str, Any]]], variant: str) -> float:
    """Median over rounds of the variant's CPU-seconds over the reference-style loop's of the same round."""
    pairs = zip(runs[variant], runs["reference"], strict=True)
    return statistics.median(run["cpu_s"] / reference["cpu_s"] for run, reference in pairs)


def report(figures: dict[str, Any]) -> None:
    """The figures as lines."""
    print(
        f"losses agree to {figures['loss_difference']:.1e}, gradient norms to {figures['gradient_norm_difference']:.1e}"
    )
    print(f"{'':22}{'CPU-s':>8}{'ratio':>8}{'spread':>14}{'live MB':>10}{'ratio':>8}{'RSS MB':>9}")
    cpu, live, rss = figures["cpu_s"], figures["live_bytes"], figures["rss_bytes"]
    for name in VARIANTS:
        low, high = figures["cpu_s_spread"][name]
        print(
            f"{name:22}{cpu[name]:8.2f}{cpu[name] / cpu['reference']:8.3f}{f'{low:.2f} to {high:.2f}':>14}"
            f"{live[name] / 1e6:10.0f}{live[name] / live['reference']:8.3f}{rss[name] / 1e6:9.0f}"
        )
    print(f"time ratio, paired by round: ours {figures['time_ratio']:.3f}, cached {figures['cached_time_ratio']:.3f}")
    print(f"in 1024^3 products ({figures['product_s']:.4f} CPU-s here), the published reference = 1:")
    print(
        f"  ours {figures['against_published']:.3f}, our loop done its way {figures['reference_against_published']:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
