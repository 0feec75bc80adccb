"""scripts/slurm.sh, run for real against stand-ins of SLURM's commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm.sh"
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then echo node7; echo node8; else echo "scontrol $*" >>"$CALLS"; fi',
    "srun": 'printf "%s\\n" "$@" >>"$CALLS"; trap "exit ${STOPPED:-143}" TERM; echo $$ >"$CALLS.pid"; '
    'for _ in $(seq "${STEPS:-0}"); do sleep 0.1; done; exit "${CODE:-0}"',
    "scancel": 'echo "scancel $*" >>"$CALLS"; kill -TERM "$(cat "$CALLS.pid")"',
}


def _start(folder: Path, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {
        **{"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "SLURM_JOB_ID": "41"},
        **{"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", **extra},
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _terminate(process: subprocess.Popen[str], folder: Path) -> None:
    """SIGTERM when the step runs."""
    end = time.monotonic() + 20
    while not (folder / "calls.pid").is_file() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)


def test_the_slurm_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_torchrun_meets_on_the_first_host_and_gets_the_options(tmp_path: Path) -> None:
    process = _start(tmp_path, "x.yaml", "run.init_lr=1e-5", "model.end_sym=a b")
    assert process.wait(20) == 0
    words = (tmp_path / "calls").read_text().splitlines()
    for word in ("--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=node7:20041", "--rdzv-backend=c10d"):
        assert word in words
    assert words[words.index("--cfg-path") :] == [
        *("--cfg-path", "x.yaml", "--resume", "auto", "--options", "run.init_lr=1e-5", "model.end_sym=a b")
    ]


def test_a_failed_run_keeps_its_exit_code_and_is_not_queued_again(tmp_path: Path) -> None:
    assert _start(tmp_path, "x.yaml", CODE="2").wait(20) == 2
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_a_sigterm_reaches_the_ranks_and_puts_the_job_back_into_the_queue(tmp_path: Path) -> None:
    process = _start(tmp_path, "x.yaml", STEPS="150")
    _terminate(process, tmp_path)
    assert process.wait(20) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-2:] == ["scancel --signal=TERM 41.0", "scontrol requeue 41"]


def test_a_run_that_finishes_in_spite_of_sigterm_is_not_queued_again(tmp_path: Path) -> None:
    process = _start(tmp_path, "x.yaml", STEPS="150", STOPPED="0")
    _terminate(process, tmp_path)
    assert process.wait(20) == 0
    assert "requeue" not in (tmp_path / "calls").read_text()


def test_without_a_configuration_the_usage_is_shown(tmp_path: Path) -> None:
    process = _start(tmp_path)
    assert process.wait(20) == 2
    assert process.stderr is not None and "usage: sbatch scripts/slurm.sh FILE.yaml" in process.stderr.read()
