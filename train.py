"""Train a model described by a YAML file.

    python train.py --cfg-path train_configs/x.yaml
    torchrun --nproc-per-node 8 train.py --cfg-path train_configs/x.yaml --options run.init_lr=1e-5

Read on in minigpt4/cli.py (``train``), minigpt4/runners/runner_base.py and minigpt4/tasks/base_task.py.
"""

from __future__ import annotations

import sys

from minigpt4.cli import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:]))
