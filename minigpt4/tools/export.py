"""``minigpt4 export``: a trained model for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

TARGETS = {
    "pth": "one .pth as MiniGPT-4 writes it: trained tensors under the published names, no optimiser state",
    "peft": "a peft adapter for the language model, and projection.safetensors",
    "merged": "an ordinary language model folder with LoRA merged, and projection.safetensors",
    "hf": "the whole model for AutoModelForImageTextToText and AutoProcessor, with its code (trust_remote_code)",
    "blip2": "MiniGPT-4 with Q-Former as Blip2ForConditionalGeneration, no code needed",
}
"""Values of --to, known without heavy imports."""
EXAMPLES = """\
targets:
{targets}

examples:
  minigpt4 export output/my_faces --to hf --out my_faces_hf
  minigpt4 export output/my_faces/20260101_120000/checkpoints/best --to merged --out my_faces_lm --dtype bfloat16
  minigpt4 export output/my_faces --to pth --out my_faces.pth
  minigpt4 export --cfg-path eval_configs/minigpt4_eval.yaml --to blip2 --out minigpt4_blip2
  minigpt4 export weights/minigpt4_vicuna7b.pth --cfg-path eval_configs/minigpt4_eval.yaml --to hf --out minigpt4_hf

Every export is read back from its files and must give the logits and the greedy answer of the model on one picture and
question; otherwise nothing is left at --out. It runs on the CPU in float32: about 4 bytes of memory per parameter."""


def main(argv: Sequence[str]) -> int:
    """Export one model; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    given = build_parser().parse_args(argv)

    from minigpt4 import catalog
    from minigpt4.export.run import TARGETS as targets
    from minigpt4.export.run import Wishes, export
    from minigpt4.export.source import open_source

    catalog.load()
    source = open_source(given.ckpt, given.cfg_path, given.options, given.question_processor)
    wishes = Wishes(Path(given.out), given.force, given.dtype, given.image, given.question, given.seed)
    export(source, targets[given.to], wishes)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 export``."""
    targets = "\n".join(f"  {name:<7} {text}" for name, text in TARGETS.items())
    parser = argparse.ArgumentParser(
        prog="minigpt4 export",
        description="Write a trained model in a format of other programs, and check that it still answers the same.",
        epilog=EXAMPLES.format(targets=targets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ckpt", nargs="?", metavar="CKPT", help="checkpoint or job folder; a .pth with --cfg-path")
    parser.add_argument("--cfg-path", metavar="FILE", help="YAML of the model, for published weights")
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="format, see below")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to make (for pth also a name ending in .pth)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export at --out")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of the weights in merged, hf and blip2; auto = that of the language model on disk (default)",
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument("--image", metavar="FILE", help="picture of the check (default: a drawn one)")
    parser.add_argument("--question", metavar="TEXT", help="question of the check (default: one of a list)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn picture and the question (0)")
    parser.add_argument(
        "--question-processor",
        default="auto",
        metavar="NAME",
        help="text processor of questions: auto = the checkpoint's (default), identity, blip_caption",
    )
    return parser
