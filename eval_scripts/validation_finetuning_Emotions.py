"""Ask for the emotion of every picture in fifty ways, and see how often the answer is the same and right.

python eval_scripts/validation_finetuning_Emotions.py --ckpt output/<job> --image-dir faces --ground-truth truth.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, also where it is not installed

from minigpt4.cli import report_errors  # noqa: E402
from minigpt4.evaluation.faces.command_line import validate_emotions  # noqa: E402

if __name__ == "__main__":
    sys.exit(report_errors(lambda: validate_emotions(sys.argv[1:])))
