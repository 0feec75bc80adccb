r"""Score a model on OK-VQA, VizWiz, IconQA, GQA, VSR and Hateful Memes.

torchrun --nproc-per-node 1 eval_scripts/eval_vqa.py --cfg-path eval_configs/minigptv2_benchmark_evaluation.yaml \
    --dataset okvqa,vizwiz,iconvqa,gqa,vsr,hm
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from minigpt4.cli import report_errors  # noqa: E402
from minigpt4.evaluation.command_line import eval_vqa  # noqa: E402

if __name__ == "__main__":
    sys.exit(report_errors(lambda: eval_vqa(sys.argv[1:])))
