"""What ``model.cache_vision: disk`` saves: epochs per hour with and without it, and what filling it costs.

    python benchmarks/feature_cache.py                       3 alternating rounds of 4 epochs
    python benchmarks/feature_cache.py --quick --json out.json

The quickstart's face stage (EVA-like tower 128 x 4 at 64 px, its small language model, LoRA rank 8, batch 32) on drawn
faces, one record per picture, on the CPU in float32, one thread, no loader workers: decoding counts. Every variant runs
in a process of its own: off; build (an empty cache, filled first); disk (a full cache). Losses of every window must
agree to 1e-4 relative before any figure is printed. An epoch is one pass over the pictures; its time is that of the
training loop, without building the model, with one checkpoint at the end of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shared import in_process, parser, write_json  # noqa: E402

VARIANTS = ("off", "build", "disk")
BATCH = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print."""
    options = parser(__doc__, "one round of two epochs of 256 pictures")
    options.add_argument("--rounds", type=int, default=3, help="alternating rounds (default 3)")
    options.add_argument("--pictures", type=int, default=1024, help="pictures, a multiple of 32 (default 1024)")
    options.add_argument("--epochs", type=int, default=4, help="passes over the pictures per run (default 4)")
    options.add_argument("--worker", nargs=2, metavar=("VARIANT", "YAML"), help=argparse.SUPPRESS)
    given = options.parse_args(argv)
    if given.worker:
        print(json.dumps(work(given.worker[0], given.worker[1])))
        return 0
    rounds, pictures, epochs = (1, 256, 2) if given.quick else (given.rounds, given.pictures, given.epochs)
    with tempfile.TemporaryDirectory() as folder:
        config = write_run(Path(folder), pictures, epochs)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for number in range(rounds):
            for name in VARIANTS:  # disk reads what build has written
                print(f"round {number + 1}/{rounds}: {name}", file=sys.stderr, flush=True)
                runs[name].append(in_process(__file__, "--worker", name, str(config)))
    figures = summarise(runs, pictures, epochs)
    write_json(given.json, {**figures, "runs": runs})
    report(figures)
    return 0


def write_run(folder: Path, pictures: int, epochs: int) -> Path:
    """Drawn faces, a record for each, and the YAML of the quickstart's model on them."""
    import yaml

    draw = [sys.executable, str(ROOT / "dataset/draw_faces.py"), "--out", str(folder / "data"), "--seed", "1"]
    subprocess.run([*draw, "--train", str(pictures + 64), "--test", "100"], check=True, capture_output=True)
    records = json.loads((folder / "data/sharegpt/sharegpt_faces.json").read_text())
    first = {record["image"]: record for record in reversed(records)}
    chosen = [first[image] for image in sorted(first)[:pictures]]
    if len(chosen) < pictures:
        raise SystemExit(f"{len(chosen)} pictures have a record, {pictures} are wanted")
    (folder / "faces.json").write_text(json.dumps(chosen))
    content = yaml.safe_load((ROOT / "train_configs/quickstart_face.yaml").read_text())
    info = {"ann_path": str(folder / "faces.json"), "image_path": str(folder / "data")}
    content["datasets"] = {"faces": {"format": "conversation", "build_info": info, "batch_size": BATCH}}
    content["run"] |= {
        "max_epoch": epochs,
        "iters_per_epoch": pictures // BATCH,
        "save_every": epochs * (pictures // BATCH),
        "num_workers": 0,
        "log_freq": 1,
        "output_dir": str(folder / "jobs"),
        "cache_root": str(folder / "cache"),
        "trackers": ["jsonl"],
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def work(variant: str, config: str) -> dict[str, Any]:
    """Seconds on the clock and of the CPU of filling the cache and of the training loop; losses."""
    import shutil

    import torch

    from minigpt4 import catalog
    from minigpt4.common.config import load_config
    from minigpt4.common.dist import single
    from minigpt4.common.logger import read_log
    from minigpt4.runners import runner_base as module

    runner_base: Any = module  # parts of it are replaced
    torch.set_num_threads(1)
    catalog.load()
    cfg = load_config(config, [f"model.cache_vision={'off' if variant == 'off' else 'disk'}"])
    if variant == "build":
        shutil.rmtree(cfg.run.cache_root, ignore_errors=True)
    spent: dict[str, float] = {}
    use_cache, runner_base.draw_curve = runner_base.use_cache, lambda job_dir: None

    def timed(*arguments: Any) -> Any:
        with Timer(spent, "cache"):
            return use_cache(*arguments)

    runner_base.use_cache = timed
    runner = runner_base.RunnerBase(cfg, single("cpu"))
    with Timer(spent, "train"):
        runner.train()
    losses = [row["loss"] for row in read_log(runner.job_dir / "log.txt") if "loss" in row]
    rows = list(Path(cfg.run.cache_root).glob("*/*.rows"))
    return {"losses": losses, "bytes": sum(path.stat().st_size for path in rows), **spent}


class Timer:
    """Adds ``<name>_s`` and ``<name>_cpu_s`` to a mapping."""

    def __init__(self, spent: dict[str, float], name: str) -> None:
        self.spent, self.name = spent, name

    def __enter__(self) -> None:
        self.begun, self.begun_cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.spent[f"{self.name}_s"] = time.perf_counter() - self.begun
        self.spent[f"{self.name}_cpu_s"] = time.process_time() - self.begun_cpu


def summarise(runs: dict[str, list[dict[str, Any]]], pictures: int, epochs: int) -> dict[str, Any]:
    """Medians and ratios. Raises SystemExit when the variants do not compute the same losses."""
    expected = runs["off"][0]["losses"]
    losses = [run["losses"] for name in VARIANTS for run in runs[name]]
    difference = max(abs(a - b) / b for found in losses for a, b in zip(found, expected, strict=True))
    if difference > 1e-4:
        raise SystemExit(f"losses differ by {difference:.2e}; no figure is printed")

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    figures: dict[str, Any] = {"loss_difference": difference, "pictures": pictures, "epochs": epochs}
    for clock in ("s", "cpu_s"):
        epoch = {name: median(name, f"train_{clock}") / epochs for name in ("off", "disk")}
        cost, lookup = median("build", f"cache_{clock}"), median("disk", f"cache_{clock}")
        saved = epoch["off"] - epoch["disk"]
        figures[clock] = {
            "epoch": epoch,
            "epochs_per_hour": {name: 3600 / value for name, value in epoch.items()},
            "speedup": epoch["off"] / epoch["disk"],
            "build": cost,
            "lookup": lookup,
            "break_even_passes": cost / saved if saved > 0 else float("inf"),
        }
    off = [run["train_cpu_s"] / epochs / figures["cpu_s"]["epoch"]["off"] for run in runs["off"]]
    return {**figures, "bytes_per_picture": runs["disk"][0]["bytes"] / pictures, "off_spread": [min(off), max(off)]}


def report(figures: dict[str, Any]) -> None:
    """The figures as lines."""
    print(f"losses agree to {figures['loss_difference']:.1e} (relative)")
    print("            epoch off   epoch disk   epochs/hour off   disk   ratio   build   lookup   break-even passes")
    for clock, title in (("cpu_s", "CPU-seconds"), ("s", "wall")):
        one = figures[clock]
        epoch, rate = one["epoch"], one["epochs_per_hour"]
        print(
            f"{title:<11} {epoch['off']:>9.2f} {epoch['disk']:>12.2f} {rate['off']:>17.0f} {rate['disk']:>6.0f} "
            f"{one['speedup']:>7.2f} {one['build']:>7.2f} {one['lookup']:>8.2f} {one['break_even_passes']:>19.2f}"
        )
    low, high = figures["off_spread"]
    print(f"off against itself: {low:.2f} to {high:.2f} (CPU-seconds)")
    print(f"{figures['bytes_per_picture'] / 1000:.1f} kB on disk per picture, {figures['pictures']:,} pictures")


if __name__ == "__main__":
    sys.exit(main())
