"""What several benchmarks need: a command line, processes of their own, small random models, texts of a length."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKLOAD = ROOT / "benchmarks/workload"
IMAGE_SIDE, PATCH = 224, 14
PATCHES = (IMAGE_SIDE // PATCH) ** 2


@dataclass(frozen=True)
class Sizes:
    """Of a small MiniGPT-v2. group: patches side by side in one position, so PATCHES / group positions per picture."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    inter: int = 688
    vocab: int = 8000
    group: int = 4


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` says what is less then."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help=quick)
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return result


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """The figures of a run, if a file is wanted."""
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def environment(**more: str) -> dict[str, str]:
    """Of a process with one thread that imports this checkout."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore::FutureWarning"}
    return {**os.environ, **threads, **quiet, "PYTHONPATH": str(ROOT), **more}


def in_process(script: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """The JSON object in the last line of what ``script`` prints in a fresh process. SystemExit when it fails."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU-seconds of one call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def write_llama(folder: Path, sizes: Sizes) -> None:
    """A Llama of these sizes without weights, with the workload's tokenizer."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.inter,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(WORKLOAD / name, folder / name)


def build_model(folder: Path, sizes: Sizes) -> Any:
    """A MiniGPT-v2 of random weights in ``folder``'s tokenizer, float32, LoRA rank 16 that is not zero, train mode."""
    import torch

    from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config

    write_llama(folder, sizes)
    cfg = MiniGPTv2Config(
        image_size=IMAGE_SIDE,
        vit_model="eva",
        vit_weights="random",
        vit_config={"patch_size": PATCH, "embed_dim": 64, "depth": 1, "num_heads": 1},
        vision_tokens_per_position=sizes.group,
        llama_model=str(folder),
        llama_weights="random",
        lora_r=16,
        lora_dropout=0.0,  # both sides of a comparison must compute the same loss
        chat_template=True,
        end_sym="</s>",
        max_txt_len=2048,
    )
    model = MiniGPTv2.from_config(cfg, torch.device("cpu"), torch.float32)
    fill_adapters(model)
    return model.train()


def fill_adapters(model: Any) -> None:
    """Random numbers in LoRA's B, which starts at zero: half of the adapter's gradients would be zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters_by_name():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


class Words:
    """Texts of an exact number of tokens, whose ids fit a small vocabulary."""

    def __init__(self, encode: Callable[[str], Sequence[int]], below: int, seed: int = 0) -> None:
        text = (WORKLOAD / "samples.json").read_text(encoding="utf-8")
        found = sorted({word for word in text.split() if word.isalpha() and word.isascii()})
        ids = {word: encode(word) for word in found}
        self._words = [word for word, row in ids.items() if len(row) == 1 and row[0] < below]
        self._rng = Random(seed)

    def text(self, tokens: int) -> str:
        """``tokens`` words of one token each."""
        return " ".join(self._rng.choices(self._words, k=tokens))
