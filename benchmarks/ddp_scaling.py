"""One and two processes that train together: samples per second, how often and how much they exchange.

    python benchmarks/ddp_scaling.py                       3 rounds of 6 windows
    python benchmarks/ddp_scaling.py --quick --json out.json   1 round of 2 windows

A window is 8 micro-batches of 4 samples: one rank computes 8, two ranks 4 each, gloo on this machine, one thread per
rank, small model of random weights (Llama 256 x 4). Losses of every window must agree to 1e-5 before a figure is given.
Counted: sums of gradients over ranks per window (must be 1), bytes of them, and of the numbers that go with a window.
"every" sends gradients after every micro-batch, as loops without DDP's no_sync do. On a machine whose cores are shared,
samples per second on the clock say little; those per CPU-second say what being two costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.shared import Sizes, Words, build_model, environment, parser, say, write_json  # noqa: E402

MICRO_BATCHES, BATCH = 8, 4
VARIANTS = {"1 rank": 1, "2 ranks": 2, "2 ranks, every": 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when gradients are exchanged more than once per window."""
    options = parser(__doc__, "1 round of 2 windows")
    options.add_argument("--worker", nargs=2, metavar=("VARIANT", "WINDOWS"), help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.worker:
        work(given.worker[0], int(given.worker[1]))
        return 0
    rounds, windows = (1, 2) if given.quick else (3, 6)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in list(VARIANTS)[:: -1 if number % 2 else 1]:
            say(f"round {number + 1}/{rounds}: {name}")
            runs[name].append(start(name, windows))
    figures = summarise(runs)
    write_json(given.json, figures)
    report(figures)
    return int(figures["2 ranks"]["syncs_per_window"] != 1)


def start(variant: str, windows: int) -> dict[str, Any]:
    """All ranks of a variant; what rank 0 prints."""
    ranks = VARIANTS[variant]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place)
        command = [sys.executable, __file__, "--worker", variant, str(windows)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise SystemExit(f"{variant} failed; its error is above")
    result: dict[str, Any] = json.loads(said[0].strip().splitlines()[-1])
    return result


def work(variant: str, windows: int) -> None:
    """One rank: a warm-up window, then ``windows`` timed ones. Rank 0 prints figures of all ranks."""
    import torch

    from minigpt4.common import dist
    from minigpt4.common.schema import RunConfig
    from minigpt4.tasks import base_task

    torch.set_num_threads(1)
    found = dist.init(RunConfig(device="cpu"))
    place, sums = counting(found)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(Path(folder), Sizes())
    wrapped = place.wrap(model)
    sent = {"syncs": 0, "bytes": 0}
    if place.world_size > 1:
        # DDP reads the annotations of a hook: a lambda has none
        wrapped.register_comm_hook(sent, lambda state, bucket: count_bucket(state, bucket))
    training, task, batches = training_of(model, wrapped, place)
    sends_all = mock.patch.object(base_task, "sync_gradients", lambda *_: contextlib.nullcontext())
    losses = []
    with sends_all if variant.endswith("every") else contextlib.nullcontext():
        task.train_step(training, batches, 0)  # warms up
        sent.update(syncs=0, bytes=0)
        sums[0] = 0
        place.barrier()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        for number in range(windows):
            losses.append(task.train_step(training, batches, number + 1).loss)
        spent, spent_cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    spent_cpu = sum(place.gather_objects(spent_cpu))
    samples = windows * MICRO_BATCHES * BATCH
    figures = {
        "samples_per_s": samples / spent,
        "samples_per_cpu_s": samples / spent_cpu,
        "syncs_per_window": sent["syncs"] / windows,
        "gradient_bytes_per_window": sent["bytes"] / windows,
        "other_bytes_per_window": sums[0] / windows if place.world_size > 1 else 0,
        "losses": losses,
    }
    if place.is_main:
        print(json.dumps(figures))
    place.close()


def counting(place: Any) -> tuple[Any, list[int]]:
    """The same rank among its peers, and a cell that grows by the bytes of numbers summed over ranks."""
    from minigpt4.common.dist import DistContext

    sums = [0]

    class Counted(DistContext):
        """Counts what ``sum`` exchanges."""

        def sum(self, value: Any) -> Any:
            """See DistContext."""
            total = super().sum(value)
            sums[0] += total.nbytes
            return total

    return Counted(place.rank, place.world_size, place.local_rank, place.device), sums


def count_bucket(sent: dict[str, int], bucket: Any) -> Any:
    """DDP's own sum over ranks, counted; the last bucket of a backward ends one exchange."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    sent["bytes"] += bucket.buffer().nbytes
    sent["syncs"] += bucket.is_last()
    hook: Any = allreduce_hook
    return hook(None, bucket)


def training_of(model: Any, wrapped: Any, place: Any) -> tuple[Any, Any, list[Any]]:
    """What a step needs, the task, and this rank's micro-batches of the window, one packed row each."""
    import torch

    from minigpt4.common.optim import build_optimizer
    from minigpt4.common.schema import RunConfig
    from minigpt4.common.types import IMAGE_TAG, Sample, Turn
    from minigpt4.datasets.collate import collate_packed
    from minigpt4.tasks.base_task import Training
    from minigpt4.tasks.image_text_pretrain import ImageTextPretrainTask

    words = Words(model.encoder.tokenizer.encode, 8000)
    generator = torch.Generator().manual_seed(0)
    side = model.cfg.image_size
    rows = []
    for number in range(MICRO_BATCHES):
        samples = [
            Sample(
                (Turn(f"<Img>{IMAGE_TAG}</Img> {words.text(20)}", words.text(20 + 13 * (number + each) % 120)),),
                (torch.randn(3, side, side, generator=generator),),
                f"{number}.{each}",
            )
            for each in range(BATCH)
        ]
        rows += collate_packed(samples, model.encoder, 4096)
    training = Training(
        model=wrapped,
        core=model,
        optimizer=build_optimizer(model.trainable_parameters_by_name(), RunConfig(), place.device),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        lr_at=lambda _: 1e-5,
        dist=place,
        accumulation=MICRO_BATCHES // place.world_size,
        clip_grad_norm=1.0,
        seed=0,
        job_dir=Path("."),
        stop_requested=lambda: False,
    )
    return training, ImageTextPretrainTask(), rows[place.rank :: place.world_size]


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds. SystemExit when ranks together do not compute what one computes."""
    expected = runs["1 rank"][0]["losses"]
    losses = [run["losses"] for rows in runs.values() for run in rows]
    difference = max(abs(a - b) for row in losses for a, b in zip(row, expected, strict=True))
    if difference > 1e-5:
        raise SystemExit(f"losses differ by {difference:.1e}; no figure is given")
    keys = [key for key in runs["1 rank"][0] if key != "losses"]
    medians = {name: {key: statistics.median(run[key] for run in rows) for key in keys} for name, rows in runs.items()}
    return {**medians, "loss_difference": difference}


def report(figures: dict[str, Any]) -> None:
    """The figures as lines."""
    print(f"losses agree to {figures['loss_difference']:.1e}")
    print(f"{'':16}samples/s   of 1 rank   samples/CPU-s   of 1 rank   exchanges   MB of gradients   other bytes")
    alone = figures["1 rank"]
    for name in VARIANTS:
        row = figures[name]
        print(
            f"{name:16}{row['samples_per_s']:9.2f}{row['samples_per_s'] / alone['samples_per_s']:12.2f}"
            f"{row['samples_per_cpu_s']:16.2f}{row['samples_per_cpu_s'] / alone['samples_per_cpu_s']:12.2f}"
            f"{row['syncs_per_window']:12.1f}{row['gradient_bytes_per_window'] / 1e6:18.2f}"
            f"{row['other_bytes_per_window']:14.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
