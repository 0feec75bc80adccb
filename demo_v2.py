"""Chat with MiniGPT-v2 (or any checkpoint made here) in the browser. docs/DEMOS.md

python demo_v2.py --ckpt output/<job>
python demo_v2.py --cfg-path eval_configs/minigptv2_eval.yaml --gpu-id 0
"""

from __future__ import annotations

import sys

from minigpt4.cli import report_errors
from minigpt4.web.command_line import V2, main

if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(sys.argv[1:], V2)))
