"""Chat with MiniGPT-4 in the terminal: the program of demo_v2_command_line.py for arch ``minigpt4``.

python demo_v1_command_line.py --cfg-path eval_configs/minigpt4_eval.yaml --image face.png --gpu-id 0
"""

from __future__ import annotations

import sys

from minigpt4.cli import chat_command

if __name__ == "__main__":
    sys.exit(chat_command(sys.argv[1:], prog="demo_v1_command_line.py", archs=("minigpt4",)))
