"""torchrun starts a job again after a rank was killed, and nobody can tell from the losses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.logger import read_log

ROOT = Path(__file__).resolve().parents[2]


def _torchrun(folder: Path, kills: str) -> Path:
    """The finished job of two ranks with up to two restarts."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"),
        *("--monitor-interval=0.2", "-m", "tests.torture.restarted", str(folder), kills),
    ]
    result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    (job,) = (folder / "tiny").iterdir()
    return job


def _losses(job: Path) -> list[tuple[int, float]]:
    return [(row["window"], row["loss"]) for row in read_log(job / "log.txt") if "loss" in row]


@pytest.mark.slow
def test_torchrun_restarts_go_on_exactly_after_a_rank_was_killed_twice(tmp_path: Path) -> None:
    killed, alone = _torchrun(tmp_path / "killed", "3,5"), _torchrun(tmp_path / "alone", "")
    log = read_log(killed / "log.txt")
    assert [row["window"] for row in log if row.get("event") == "resumed"] == [2, 4]
    assert _losses(killed) == _losses(alone) and len(_losses(alone)) == 8
    left, right = read_checkpoint(killed).load_weights(), read_checkpoint(alone).load_weights()
    assert all(torch.equal(left[name], value) for name, value in right.items())
    print("2 kills of a rank survived under torchrun")
