"""Share of a training step that waits for data, by number of loader workers and size of the pictures.

    python benchmarks/data_wait.py                       48 windows per run
    python benchmarks/data_wait.py --quick --json out.json

The quickstart's face stage (tiny model, batch 32, float32, one thread), on its own drawn faces of 112 px and on the
same faces as JPEG of 1024 px, which cost some thirty times as much to decode. Such a small model is the hard case: a
step is shorter than that of any model worth training. The share is ``data_share`` of log.txt after the first quarter
of a run. Gate: at most 3 % with 2 workers on the faces as they are. Workers need a core each besides the trainer's.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.feature_cache import BATCH, write_run  # noqa: E402
from benchmarks.shared import environment, parser, write_json  # noqa: E402

SIZES = (112, 1024)
WORKERS = (0, 1, 2)
GATE = 0.03


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the gate is missed in the gated mode."""
    options = parser(__doc__, "16 windows, ungated")
    options.add_argument("--windows", type=int, default=48, help="optimiser steps per run (default 48)")
    given = options.parse_args(argv)
    windows = 16 if given.quick else given.windows
    shares: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = write_run(Path(folder), 8 * BATCH, 1)
        for size in SIZES:
            if size != SIZES[0]:
                enlarge(Path(folder) / "data", size)
            for workers in WORKERS:
                print(f"pictures of {size} px, {workers} workers", file=sys.stderr, flush=True)
                shares.setdefault(str(size), {})[str(workers)] = measure(config, workers, windows)
    print("pictures    " + "".join(f"{workers} workers   " for workers in WORKERS))
    for side, row in shares.items():
        print(f"{side:>5} px    " + "".join(f"{100 * row[str(workers)]:>6.1f} %    " for workers in WORKERS))
    found = shares[str(SIZES[0])]["2"]
    print(f"gate: {100 * found:.1f} % of a step waits with 2 workers, allowed {100 * GATE:.0f} %")
    write_json(given.json, {"shares": shares, "windows": windows})
    return int(found > GATE and not given.quick)


def enlarge(folder: Path, size: int) -> None:
    """Every picture below ``folder`` as it would come from a camera of ``size`` x ``size`` pixels."""
    from PIL import Image

    for path in folder.rglob("*.jpg"):
        with Image.open(path) as image:
            image.resize((size, size), Image.Resampling.BICUBIC).save(path, "JPEG", quality=92)


def measure(config: Path, workers: int, windows: int) -> float:
    """Median share of the windows after the first quarter, in a process of its own."""
    from minigpt4.common.logger import read_log

    job = f"wait{workers}"
    options = [f"run.num_workers={workers}", f"run.iters_per_epoch={windows}", f"run.save_every={windows}"]
    options += [f"run.job_name={job}", "run.cache_root=" + str(config.parent / "none")]
    command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(config), "--options", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{workers} workers failed:\n{done.stderr[-3000:]}")
    newest = max((config.parent / "jobs" / job).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    rows = [row["data_share"] for row in read_log(newest / "log.txt") if "data_share" in row]
    return statistics.median(rows[len(rows) // 4 :])


if __name__ == "__main__":
    sys.exit(main())
