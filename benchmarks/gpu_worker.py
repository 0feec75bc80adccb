"""One variant of ``gpu_real_size.py`` in a process of its own; prints a JSON row per micro-batch, running out of memory
included, which ends it.

python benchmarks/gpu_worker.py '{"workload": "v2", "size": "tiny", "loop": "ours", "micro_batches": [1], ...}'
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import charts  # noqa: E402
from benchmarks.flops import Decoder, Tower, step_flops  # noqa: E402
from benchmarks.reference_loop import ReferenceLoop  # noqa: E402
from benchmarks.shared import Sizes, Words, fill_adapters, write_llama  # noqa: E402
from minigpt4.common.optim import build_optimizer  # noqa: E402
from minigpt4.common.schema import RunConfig  # noqa: E402
from minigpt4.common.types import IMAGE_TAG, Batch, Sample, Turn  # noqa: E402
from minigpt4.datasets.collate import collate_packed, collate_padded  # noqa: E402
from minigpt4.models import base_model, frozen_vision, fused  # noqa: E402
from minigpt4.models.llm import causal_lm  # noqa: E402
from minigpt4.models.minigpt4 import MiniGPT4, MiniGPT4Config  # noqa: E402
from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config  # noqa: E402
from minigpt4.models.recompute import recompute_mlps  # noqa: E402

CARD_24 = 24.0e9
"""Bytes that PyTorch may take of a 24 GiB card: 24.6 GB are usable, 0.6 GB go to the CUDA context."""
BATCHES = 4
"""Micro-batches of different lengths that take turns."""
PICTURES = 64
"""As many as the largest micro-batch: a picture that stands twice in one would be computed once."""
WHOLE_ROW = 1 << 20


@dataclass(frozen=True)
class MicroBatch:
    """The same samples for both loops: texts and pictures, and rows of this project."""

    turns: list[Turn]
    pictures: Tensor
    rows: list[Batch]


@dataclass(frozen=True)
class Shape:
    """Of a workload: side of the picture, image positions, tower, decoder, tokens of instructions and of answers."""

    side: int
    positions: int
    tower: Tower
    decoder: Decoder
    heads: int
    asked: tuple[int, int]
    said: tuple[int, int]


EVA = (1408, 39, 6144)
VICUNA, ADAPTED = Decoder(4096, 32, 11008, 32000), Decoder(4096, 32, 11008, 32000, 64)
SMALL = Decoder(64, 2, 128, 32000)
SHAPES = {
    ("v2", "real"): Shape(448, 256, Tower(*EVA, 1025), ADAPTED, 32, (10, 36), (20, 220)),
    ("stage1", "real"): Shape(224, 32, Tower(*EVA, 257, behind=12.7e9), VICUNA, 32, (0, 0), (8, 30)),
    ("stage2", "real"): Shape(224, 32, Tower(*EVA, 257, behind=12.7e9), VICUNA, 32, (15, 21), (60, 260)),
    ("v2", "tiny"): Shape(56, 4, Tower(32, 1, 140, 17), Decoder(64, 2, 128, 32000, 4), 2, (10, 36), (20, 60)),
    ("stage1", "tiny"): Shape(56, 4, Tower(32, 1, 140, 17), SMALL, 2, (0, 0), (8, 30)),
    ("stage2", "tiny"): Shape(56, 4, Tower(32, 1, 140, 17), SMALL, 2, (15, 21), (20, 60)),
}  # fmt: skip
SMALL_TOWER = {"patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 1}
SMALL_QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def main() -> None:
    """Measure one variant, or the ceilings of the machine."""
    spec = json.loads(sys.argv[1])
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if spec["loop"] == "ceilings":
        print(json.dumps(ceilings(device)), flush=True)
        return
    if device.type == "cpu":
        torch.set_num_threads(1)
    elif spec["cap_24gb"]:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_24 / total))
    size = 0
    try:
        job = Job(spec, device)
        for size in spec["micro_batches"]:
            print(json.dumps({"micro_batch": size, **job.run(size)}), flush=True)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps({"micro_batch": size, "oom": True, "said": str(error).splitlines()[0][:200]}), flush=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the allocator, or a library that allocates by itself, had no memory left."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "alloc_failed" in said


def ceilings(device: torch.device) -> dict[str, Any]:
    """Operations per second of a product in the dtype of training, bytes per second of a copy (read and write)."""
    dtype, side = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 512)
    factor, product = (
        torch.randn(side, side, device=device, dtype=dtype),
        torch.empty(side, side, device=device, dtype=dtype),
    )
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "product_flops": 2 * side**3 / timed(lambda: torch.mm(factor, factor, out=product), device),
        "copy_bytes": 2 * source.numel() / timed(lambda: target.copy_(source), device),
    }  # fmt: skip


def timed(run: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    """Seconds on the clock of one call, mean of ``rounds`` after three."""
    for _ in range(3):
        run()
    wait(device)
    begun = time.perf_counter()
    for _ in range(rounds):
        run()
    wait(device)
    return (time.perf_counter() - begun) / rounds


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Job:
    """A model, a loop over it and its micro-batches."""

    def __init__(self, spec: dict[str, Any], device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.shape = SHAPES[spec["workload"], spec["size"]]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        is_ours = spec["loop"] == "ours"
        own_layers = nullcontext() if is_ours else mock.patch.object(base_model, "use_lean_layers", lambda llm: None)
        with tempfile.TemporaryDirectory() as folder, own_layers:
            self.model = build(spec, self.shape, Path(folder), device, dtype)
        lm = causal_lm(self.model.llama_model)
        if spec["nf4"]:
            quantise(lm, dtype)
        if spec["recompute"] == "mlp":
            recompute_mlps(lm)
        if spec["loop"] == "fork":
            lm.float()
        self.model.train()
        self.reference = (
            None if is_ours else ReferenceLoop(self.model, copies=False, keeps_outputs=spec["loop"] == "fork")
        )
        if is_ours and self.model.attends_by_sample:
            self.model.choose_packing_backend("auto")
        with self.model.autocast():
            self.layers = fused.choose("compile" if spec["compiled"] else "none", lm, device, dtype, 0).why
        # rate 0: an update costs the same, and every micro-batch meets the weights of the start
        run = RunConfig(init_lr=0.0, min_lr=0.0)
        self.optimizer = build_optimizer(self.model.trainable_parameters_by_name(), run, device)
        side, generator = self.shape.side, torch.Generator().manual_seed(0)
        self.pictures = torch.randn(PICTURES, 3, side, side, generator=generator)
        if spec["cached"]:
            parts = [frozen_vision.frozen_features(self.model, part) for part in self.pictures.split(4)]
            self.pictures = torch.cat(parts)
            frozen_vision.release(self.model)

    def run(self, size: int) -> dict[str, Any]:
        """Speed, memory and first loss at a micro-batch of ``size``."""
        words, rng = Words(self.model.encoder.tokenizer.encode, 8000), Random(size)
        batches = [self.collate(self.samples(size, words, rng)) for _ in range(BATCHES)]
        first = self.first_loss(batches[0])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        steps = self.spec["steps"]
        order = [batches[number % BATCHES] for number in range(steps)]
        for batch in order[:3]:
            self.step(batch)
        wait(self.device)
        begun = time.perf_counter()
        for batch in order:
            self.step(batch)
        wait(self.device)
        seconds = time.perf_counter() - begun
        lengths = [count for batch in order for count in sample_lengths(batch.rows)]
        tower = None if self.spec["cached"] else self.shape.tower
        own = [parameter for parameter in self.model.parameters() if parameter.device == self.device]
        figures: dict[str, Any] = {
            "first_loss": first,
            "step_s": seconds / steps,
            "samples_per_s": size * steps / seconds,
            "target_tokens_per_s": sum(targets for _, targets in lengths) / seconds,
            "real_tokens_per_s": sum(length for length, _ in lengths) / seconds,
            "flops_per_s": step_flops(tower, self.shape.decoder, lengths) / seconds,
            "static_bytes": sum(parameter.numel() * parameter.element_size() for parameter in own),
            "back_end": self.model.packing_backend if self.reference is None else "eager",
            "layers": self.layers,
        }
        if self.device.type == "cuda":
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
            figures["reserved_bytes"] = torch.cuda.max_memory_reserved()
        else:
            figures["peak_bytes"] = figures["static_bytes"] + self.live_bytes(batches[0])
        if self.spec["profile"]:
            figures["operations"] = self.profile(batches[0], size)
        return figures

    def samples(self, size: int, words: Words, rng: Random) -> list[Sample]:
        """A micro-batch of mixed lengths, one picture each."""
        made, start = [], rng.randrange(PICTURES)
        for number in range(size):
            asked, said = rng.randint(*self.shape.asked), rng.randint(*self.shape.said)
            question = f"<Img>{IMAGE_TAG}</Img> {words.text(asked)}" if asked else IMAGE_TAG
            picture = self.pictures[(start + number) % PICTURES]
            made.append(Sample((Turn(question, words.text(said)),), (picture,), str(number)))
        return made

    def collate(self, samples: list[Sample]) -> MicroBatch:
        """In page-locked memory, as loaders give it to a GPU."""
        if self.model.attends_by_sample:
            rows = collate_packed(samples, self.model.encoder, WHOLE_ROW)
        else:
            rows = [collate_padded(samples, self.model.encoder)]
        pictures = torch.stack([sample.images[0] for sample in samples])
        if self.device.type == "cuda":
            rows, pictures = [row.pin_memory() for row in rows], pictures.pin_memory()
        return MicroBatch([sample.turns[0] for sample in samples], pictures, rows)

    def losses(self, batch: MicroBatch) -> Iterator[Tensor]:
        """Losses whose sum is the mean over supervised tokens."""
        if self.reference is None:
            count = sum(row.num_target_tokens for row in batch.rows)
            for row in batch.rows:
                yield self.model(row.to(self.device)).loss_sum / count
            return
        pictures = batch.pictures.to(self.device, non_blocking=True)
        with self.model.autocast():
            yield self.reference.loss(
                pictures, [turn.prompt for turn in batch.turns], [turn.answer for turn in batch.turns]
            )

    def step(self, batch: MicroBatch) -> None:
        """Forward, backward, update; the fork empties the allocator's cache after each."""
        for loss in self.losses(batch):
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.spec["loop"] == "fork" and self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def first_loss(self, batch: MicroBatch) -> float:
        """Loss without dropout."""
        self.model.eval()
        total = sum(float(loss) for loss in self.losses(batch))
        self.model.train()
        return total

    def live_bytes(self, batch: MicroBatch) -> int:
        """On a CPU, which counts no peaks: bytes of live tensors of a step."""
        from minigpt4.tools.live_memory import LiveMemory

        with LiveMemory() as memory:
            self.step(batch)
        return memory.peak

    def profile(self, batch: MicroBatch, size: int) -> dict[str, float]:
        """Milliseconds of one step by operation, the longest fourteen; drawn into the folder of profiles."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=kinds) as found:
            self.step(batch)
            wait(self.device)
        key = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        spent = {event.key: getattr(event, key) / 1e3 for event in found.key_averages()}
        longest = dict(sorted(spent.items(), key=lambda item: -item[1])[:14])
        name = f"{self.spec['workload']} {self.spec['name']}, micro-batch {size}"
        path = Path(self.spec["profile"]) / f"profile_{name.replace(' ', '_').replace(',', '')}.svg"
        groups = [(operation[:34], [(value, 0)]) for operation, value in longest.items()]
        path.write_text(
            charts.bars(f"{name}: ms, of {sum(spent.values()):.0f} in a step", [], groups), encoding="utf-8"
        )
        return longest


def sample_lengths(rows: list[Batch]) -> list[tuple[int, int]]:
    """(positions, supervised positions) of every sample of packed or padded rows."""
    found = []
    for batch in rows:
        is_target = batch.labels >= 0
        if len(batch.lengths) == len(is_target):
            found += [(n, int(row.sum())) for n, row in zip(batch.lengths, is_target, strict=True)]
            continue
        parts = is_target[0].split(list(batch.lengths))
        found += [(n, int(part.sum())) for n, part in zip(batch.lengths, parts, strict=True)]
    return found


def build(spec: dict[str, Any], shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of a workload, of random weights made on ``device``."""
    decoder = shape.decoder
    write_llama(folder, Sizes(decoder.width, decoder.layers, shape.heads, decoder.mlp, decoder.words))
    is_tiny = spec["size"] == "tiny"
    common: dict[str, Any] = {
        "image_size": shape.side,
        "vit_model": "eva" if is_tiny else "eva_clip_g",
        "vit_config": SMALL_TOWER if is_tiny else {},
        "vit_weights": "random",
        "llama_model": str(folder),
        "llama_weights": "random",
        "end_sym": "</s>",
        "max_txt_len": 1024,
        "use_grad_checkpoint_llm": spec["recompute"] == "full",
    }
    model: Any
    if spec["workload"] == "v2":
        dropout = 0.0 if is_tiny else 0.05
        cfg = MiniGPTv2Config(**common, lora_r=decoder.rank, lora_dropout=dropout, chat_template=True)
        model = MiniGPTv2.from_config(cfg, device, dtype)
        fill_adapters(model)
        return model
    qformer = SMALL_QFORMER if is_tiny else {}
    more: dict[str, Any] = {"q_former_model": "random", "qformer_config": qformer, "num_query_token": shape.positions}
    model = MiniGPT4.from_config(MiniGPT4Config(**common, **more), device, dtype)
    return model


def quantise(lm: Any, dtype: torch.dtype) -> None:
    """Frozen linear layers but the head become nf4 ones with the same weights, as quantised loading makes them."""
    import bitsandbytes
    from torch import nn

    layers: Any = bitsandbytes.nn
    head = lm.get_output_embeddings()
    for name, module in list(lm.named_modules()):
        if type(module) is not nn.Linear or module is head or module.weight.requires_grad:
            continue
        layer = layers.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        weight = layers.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer.weight = weight.to(module.weight.device)
        lm.set_submodule(name, layer)


if __name__ == "__main__":
    main()
