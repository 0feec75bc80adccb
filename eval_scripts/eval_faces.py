r"""Score a model on face data: expressions, attributes, age, multiple choice, descriptions, and groups of people.

python eval_scripts/eval_faces.py --ckpt output/<job> --dataset rafdb --data-root /data/RAF-DB --out scores/rafdb
torchrun --nproc-per-node 4 eval_scripts/eval_faces.py --ckpt output/<job> --dataset own --annotations test.csv \
    --data-root images --question "What is the emotion?" --by skin_type --mode both --out scores/test
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from minigpt4.cli import report_errors  # noqa: E402
from minigpt4.evaluation.faces.command_line import eval_faces  # noqa: E402

if __name__ == "__main__":
    sys.exit(report_errors(lambda: eval_faces(sys.argv[1:])))
