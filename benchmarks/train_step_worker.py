"""One variant of ``train_step.py`` in a process of its own: builds the workload, runs it, prints its figures as JSON.

python benchmarks/train_step_worker.py VARIANT LANGUAGE_MODEL_FOLDER MICRO_BATCHES [--memory]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this checkout, wherever the command was given

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.reference_loop import ReferenceLoop  # noqa: E402
from minigpt4.common.types import Batch, Sample, Turn  # noqa: E402
from minigpt4.datasets.collate import collate_packed, collate_padded  # noqa: E402
from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config  # noqa: E402
from minigpt4.runners.parts import choose_packing  # noqa: E402
from minigpt4.tools.live_memory import LiveMemory  # noqa: E402

ACCUMULATION = 8
ROW_TOKENS = 4096
Step = Callable[[int], float]
"""Number of a micro-batch -> its mean loss; gradients are added."""


def main() -> None:
    """Measure one variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=("reference", "reference_recompute", "ours", "recompute", "cached"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("batches", type=int)
    parser.add_argument("--memory", action="store_true", help="count live bytes too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(given.folder, recompute=given.variant == "recompute").train()
    samples = json.loads((HERE / "workload/samples.json").read_text())[: given.batches]
    images = random_images()
    if given.variant.startswith("reference"):
        loop = ReferenceLoop(model, recompute=given.variant.endswith("recompute"))
        step, parameters = reference_step(loop, images, samples), loop.parameters
    else:
        if given.variant == "cached":
            with torch.no_grad():
                images = model.vision_features(images)  # [16, P, 4C], as a feature cache stores them
        step, parameters = our_step(model, images, samples), [p for p in model.parameters() if p.requires_grad]
    touch([*model.parameters(), *parameters])
    figures = run(step, parameters, given.batches)
    if given.memory:
        figures["live_bytes"] = max(peak_bytes(step, parameters, number) for number in heaviest(model, samples))
    print(json.dumps(figures))


def run(step: Step, parameters: Sequence[nn.Parameter], batches: int) -> dict[str, Any]:
    """Losses, gradient norm of the first window, CPU-seconds per micro-batch, growth of resident memory."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    built = resident_bytes()
    step(0)  # warm-up: first touch of the weights
    optimizer.zero_grad(set_to_none=True)
    losses, products, seconds, norm = [], [], 0.0, 0.0
    window = min(batches, ACCUMULATION)
    for number in range(batches):
        show(f"    micro-batch {number + 1}/{batches}")
        begun = time.process_time()
        losses.append(step(number))
        if (number + 1) % window == 0:
            norm = norm or gradient_norm(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds += time.process_time() - begun
        products.append(product_seconds())
    show("")
    return {
        "losses": losses,
        "gradient_norm": norm,
        "cpu_s": seconds / batches,
        "product_s": statistics.median(products),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - built,
    }


def our_step(model: MiniGPTv2, images: Tensor, samples: Sequence[Sequence[dict[str, Any]]]) -> Step:
    """The project's own path; batches are made before the step, as loader workers make them."""
    collated = [as_rows(model, images, batch) for batch in samples]

    def step(number: int) -> float:
        rows = collated[number]
        count = sum(row.num_target_tokens for row in rows)
        total = 0.0
        for row in rows:
            loss = model(row).loss_sum / count
            loss.backward()
            total += loss.item()
        return total

    return step


def as_rows(model: MiniGPTv2, images: Tensor, batch: Sequence[dict[str, Any]]) -> list[Batch]:
    """A micro-batch of the workload as the project's loader makes it for ``model``."""
    samples = [
        Sample((Turn(s["instruction_input"], s["answer"]),), (images[s["image"]],), str(number))
        for number, s in enumerate(batch)
    ]
    if choose_packing("auto", model) == "packed":
        return collate_packed(samples, model.encoder, ROW_TOKENS)
    return [collate_padded(samples, model.encoder)]


def reference_step(loop: ReferenceLoop, images: Tensor, samples: Sequence[Sequence[dict[str, Any]]]) -> Step:
    """The reference's way, tokenising included."""

    def step(number: int) -> float:
        batch = samples[number]
        pixels = images[[s["image"] for s in batch]]
        loss = loop.loss(pixels, [s["instruction_input"] for s in batch], [s["answer"] for s in batch])
        loss.backward()
        return loss.item()

    return step


def recipe() -> dict[str, Any]:
    """Sizes of the workload."""
    content: dict[str, Any] = json.loads((HERE / "workload/recipe.json").read_text())
    return content


def build_model(folder: Path, recompute: bool = False) -> MiniGPTv2:
    """MiniGPT-v2 of the recipe; the same random weights in every process."""
    content = recipe()
    eva, shape = content["eva"], content["shape"]
    cfg = MiniGPTv2Config(
        image_size=shape["img"],
        vit_model="eva",
        vit_weights="random",
        vit_config={
            "patch_size": eva["patch"],
            "embed_dim": eva["width"],
            "depth": eva["depth"],
            "num_heads": eva["heads"],
            "mlp_ratio": eva["mlp_ratio"],
        },
        llama_model=str(folder),
        lora_r=shape["lora_r"],
        lora_alpha=shape["lora_alpha"],
        lora_dropout=0.0,  # both loops must compute the same loss
        chat_template=True,
        end_sym="</s>",
        max_txt_len=shape["max_txt_len"],
        use_grad_checkpoint_llm=recompute,
    )
    model = MiniGPTv2.from_config(cfg, torch.device("cpu"), torch.float32, seed=shape["seed"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters_by_name():
            if "lora_B" in name:  # zero at the start: then half of the adapter's gradients would be zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def random_images() -> Tensor:
    """Sixteen random pictures [16, 3, S, S]; neither loop's cost depends on what they show."""
    size = recipe()["shape"]["img"]
    return torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0))


def heaviest(model: MiniGPTv2, samples: Sequence[Sequence[dict[str, Any]]]) -> set[int]:
    """Numbers of the micro-batch with the most real positions and of that with the most padded ones."""
    encode = model.encoder.encode_turns
    counts = [[len(encode((Turn(s["instruction_input"], s["answer"]),)).ids) for s in batch] for batch in samples]
    real = max(range(len(samples)), key=lambda number: sum(counts[number]))
    padded = max(range(len(samples)), key=lambda number: len(counts[number]) * max(counts[number]))
    return {real, padded}


def peak_bytes(step: Step, parameters: Sequence[nn.Parameter], number: int) -> int:
    """Most bytes of live tensors during one micro-batch, gradients included, weights not."""
    for parameter in parameters:
        parameter.grad = None
    with LiveMemory() as memory:
        step(number)
    return memory.peak


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """L2 norm of all gradients."""
    return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())


def product_seconds() -> float:
    """CPU-seconds of one 1024^3 float32 product on one thread."""
    factor, product = torch.ones(1024, 1024), torch.zeros(1024, 1024)
    begun = time.process_time()
    torch.mm(factor, factor, out=product)
    return time.process_time() - begun


def show(text: str) -> None:
    """One line on a terminal that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def touch(parameters: Sequence[Tensor]) -> None:
    """Read every weight: pages mapped from a file count as resident from then on."""
    for parameter in parameters:
        parameter.detach().sum()


def resident_bytes() -> int:
    """Memory of this process right now (its peak so far where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
