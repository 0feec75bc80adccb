"""Trains the two small frozen backbones of the quickstart. Their results are shipped; run this only to make them anew.

    python dataset/pretrain_backbones.py --out dataset/quickstart/backbones

Vision tower: ``pretrain_vit.py``. Tokenizer and language model: ``pretrain_llm.py``. Both learn from drawings and
from text that this program generates; neither ever sees a picture of the training or test sets.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.logging import RichHandler

PARTS = ("vit", "tokenizer", "llm")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the quickstart's vision tower, tokenizer and language model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "quickstart" / "backbones", help="folder of the results"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to train; llm needs the tokenizer"
    )
    parser.add_argument(
        "--pictures", type=int, default=40000, help="drawings kept in memory for the vision tower (12 KB each)"
    )
    parser.add_argument("--vit-steps", type=int, default=4200, help="steps of 64 pictures")
    parser.add_argument("--vit-init", type=Path, help="weights (.safetensors) from which the vision tower goes on")
    parser.add_argument("--vit-lr", type=float, default=1.2e-3, help="highest learning rate of the vision tower")
    parser.add_argument("--llm-steps", type=int, default=1200, help="steps of 64 texts")
    parser.add_argument("--seed", type=int, default=20, help="seed of weights, drawings and texts")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch, and processes that draw")
    return parser.parse_args(argv)


def train_vit(out: Path, args: argparse.Namespace) -> dict[str, float]:
    """Writes vit.safetensors (half precision) and returns the held-out accuracies."""
    from pretrain_vit import train_tower
    from safetensors.torch import load_file, save_file

    start = load_file(args.vit_init) if args.vit_init else None
    tower, accuracy = train_tower(args.seed, args.pictures, args.vit_steps, start, args.vit_lr, args.threads)
    save_file({name: value.half().contiguous() for name, value in tower.state_dict().items()}, out / "vit.safetensors")
    return accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    started, tokenizer = time.perf_counter(), args.out / "llm" / "tokenizer.model"
    from pretrain_llm import save_llm, train_llm, train_tokenizer

    if "tokenizer" in args.parts:
        train_tokenizer(tokenizer, args.seed)
    if "llm" in args.parts:
        save_llm(train_llm(tokenizer, args.seed, args.llm_steps), args.out / "llm")
    if "vit" in args.parts:
        accuracy = train_vit(args.out, args)
        (args.out / "vit_held_out.json").write_text(json.dumps(accuracy, indent=1) + "\n")
    logging.getLogger(__name__).info("done in %.0f minutes", (time.perf_counter() - started) / 60)


if __name__ == "__main__":
    main()
