"""One question about every picture of a folder, into a JSON file.

python demo_finetune_command_line.py --ckpt output/<job> --image-dir faces --question "What is on the picture?"
"""

from __future__ import annotations

import sys

from minigpt4.cli import report_errors
from minigpt4.evaluation.faces.command_line import caption_folder

if __name__ == "__main__":
    sys.exit(report_errors(lambda: caption_folder(sys.argv[1:])))
