"""Chat with MiniGPT-v2 (or any checkpoint made here) in the terminal.

python demo_v2_command_line.py --ckpt output/<job> --image face.png
python demo_v2_command_line.py --cfg-path eval_configs/minigptv2_eval.yaml --image face.png --gpu-id 0
"""

from __future__ import annotations

import sys

from minigpt4.cli import chat_command

if __name__ == "__main__":
    sys.exit(chat_command(sys.argv[1:], prog="demo_v2_command_line.py"))
