"""Chat with MiniGPT-4 in the browser. docs/DEMOS.md

python demo.py --ckpt output/<job>
python demo.py --cfg-path eval_configs/minigpt4_eval.yaml --gpu-id 0
"""

from __future__ import annotations

import sys

from minigpt4.cli import report_errors
from minigpt4.web.command_line import V1, main

if __name__ == "__main__":
    sys.exit(report_errors(lambda: main(sys.argv[1:], V1)))
