r"""Score a model on referring expressions: RefCOCO, RefCOCO+, RefCOCOg.

torchrun --nproc-per-node 1 eval_scripts/eval_ref.py --cfg-path eval_configs/minigptv2_benchmark_evaluation.yaml \
    --dataset refcoco,refcoco+,refcocog --resample
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from minigpt4.cli import report_errors  # noqa: E402
from minigpt4.evaluation.command_line import eval_ref  # noqa: E402

if __name__ == "__main__":
    sys.exit(report_errors(lambda: eval_ref(sys.argv[1:])))
