"""A conversation of six turns about one picture: ours against plain ``generate`` on the same random weights.

    python benchmarks/chat.py                       3 alternating rounds, gated
    python benchmarks/chat.py --quick --json out.json

Mid-size MiniGPT-v2 (EVA-like 256 x 6, Llama 512 x 8, LoRA r=16) on the CPU in float32, one thread, greedy, 128 tokens
per answer. Plain means transformers' own attention and cache, given the embeddings of the whole conversation at every
turn, with the picture encoded once too. Two more variants answer as ours do with LoRA folded into the weights, and with
that and keys and values in memory that stays in place (what a GPU's compiled step needs; here it is not compiled). All
must give the same ids before any figure is printed; they take turns within every turn of the conversation, so that a
busy machine slows all.
Only whole words can win in the random head: like an answer of a trained model, the text then tokenises to the ids that
were generated. Times are CPU-seconds; the first token of turn 1 includes the picture's way through the vision tower.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.shared import parser, write_json  # noqa: E402

GATES = {"first_token_ratio": (0.0, 1.2), "tokens_ratio": (1.0, float("inf"))}
VARIANTS = ("ours", "merged", "static", "plain")
QUESTIONS = (
    "What is the emotion of the person in the photo?",
    "Why do you think so? Please describe the mouth and the eyes.",
    "Is there one person in the picture, or are there many people?",
    "What could the person be looking at? Please answer in detail.",
    "Is the light in the photo bright, and where are the lights?",
    "What question could you ask the person in the picture?",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 1 when a gate is missed in the gated mode."""
    options = parser(__doc__, "one conversation with answers of 24 tokens, ungated")
    options.add_argument("--rounds", type=int, default=3, help="conversations (default 3)")
    options.add_argument("--tokens", type=int, default=128, help="length of every answer (default 128)")
    given = options.parse_args(argv)
    rounds, tokens = (1, 24) if given.quick else (given.rounds, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder))
        merged = copy.deepcopy(model)
        merged.merge_lora()
        converse(model, merged, 0, 4)  # warm-up, first touch of the weights
        runs = []
        for number in range(rounds):
            print(f"conversation {number + 1}/{rounds}", file=sys.stderr, flush=True)
            runs.append(converse(model, merged, number, tokens))
    figures = summarise(runs)
    write_json(given.json, {**figures, "runs": runs})
    report(figures)
    missed = [name for name, (low, high) in GATES.items() if not low <= figures[name] <= high]
    for name in missed:
        print(f"gate missed: {name} {figures[name]:.3f}, allowed {GATES[name]}")
    return 1 if missed and not given.quick else 0


def build(folder: Path) -> Any:
    """The model of the training benchmark whose head speaks whole words only."""
    import torch
    from transformers.utils import logging

    from benchmarks.train_step import build_language_model
    from benchmarks.train_step_worker import build_model

    quiet: Any = logging.disable_progress_bar
    quiet()
    torch.set_num_threads(1)
    build_language_model(folder)
    model = build_model(folder).eval()
    tokenizer: Any = model.encoder.tokenizer
    pieces = tokenizer._sp
    words = [i for i in range(3, pieces.get_piece_size()) if is_word(pieces.id_to_piece(i))]
    head = model._lm.get_output_embeddings().weight
    silent = torch.ones(len(head), dtype=torch.bool)
    silent[words] = False
    with torch.no_grad():
        head[silent] = 0
    return model


def is_word(piece: str) -> bool:
    """A piece with a space in front and at least three letters."""
    return piece.startswith("▁") and len(piece) > 3 and piece[1:].isalpha()


def converse(model: Any, merged: Any, number: int, tokens: int) -> dict[str, list[dict[str, float]]]:
    """Times of every turn, per variant. Raises SystemExit when they do not give the same ids."""
    variants: dict[str, Ours | Plain] = {
        "ours": Ours(model, tokens),
        "merged": Ours(merged, tokens),
        "static": Ours(merged, tokens, "static"),
        "plain": Plain(model, tokens),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for turn, question in enumerate(QUESTIONS):
        answers = {}
        for name in sorted(variants, reverse=(turn + number) % 2 == 1):
            clock = Clock()
            answers[name] = variants[name].answer(question, clock)
            times[name].append(clock.figures())
        for name, ids in answers.items():
            if ids != answers["plain"]:
                raise SystemExit(f"turn {turn + 1}: the ids of {name} differ from plain's; no figure is printed")
    return times


class Clock:
    """CPU-seconds since it was made: at the first token, and at the end."""

    def __init__(self) -> None:
        self.begun = time.process_time()
        self.first = 0.0

    def token(self) -> None:
        """A token has come."""
        self.first = self.first or time.process_time()

    def figures(self) -> dict[str, float]:
        """first_token: from the start; decode: from the first token to now; turn: both."""
        now = time.process_time()
        return {"first_token": self.first - self.begun, "decode": now - self.first, "turn": now - self.begun}


class Variant:
    """What both need: the picture, its processor, the length of answers."""

    def __init__(self, model: Any, tokens: int) -> None:
        from PIL import Image

        from minigpt4 import catalog
        from minigpt4.common.schema import ProcessorConfig
        from minigpt4.processors.base import ImageSpec, make_image_processor

        catalog.load()
        self.model, self.tokens = model, tokens
        self.picture = Image.linear_gradient("L").convert("RGB")
        size = ImageSpec(model.cfg.image_size)
        self.image_processor = make_image_processor(ProcessorConfig(name="blip2_image_eval"), size)


class Ours(Variant):
    """A chat session. decoding: as in ``GenerateOptions``."""

    def __init__(self, model: Any, tokens: int, decoding: str = "auto") -> None:
        from minigpt4.chat.loading import Assistant
        from minigpt4.chat.session import ChatSession
        from minigpt4.common.schema import ProcessorConfig
        from minigpt4.models.generation import GenerateOptions
        from minigpt4.processors.base import make_text_processor

        super().__init__(model, tokens)
        as_it_is = make_text_processor(ProcessorConfig())
        self.session = ChatSession(Assistant(model, self.image_processor, as_it_is, "minigpt_v2"))
        self.options = GenerateOptions(max_new_tokens=tokens, min_new_tokens=tokens, decoding=decoding)

    def answer(self, question: str, clock: Clock) -> list[int]:
        """Ids of the answer."""
        if not self.session.history:
            self.session.set_image(self.picture)
        for _ in self.session.stream(question, self.options):
            clock.token()
        ids: list[int] = self.model.encoder.tokenizer.encode(self.session.history[-1].answer)
        return ids


class Plain(Variant):
    """transformers' ``generate`` with its own attention and cache, and nothing kept from turn to turn."""

    def __init__(self, model: Any, tokens: int) -> None:
        super().__init__(model, tokens)
        self.lm = copy.deepcopy(model._lm)
        self.lm.set_attn_implementation("sdpa")
        self.history: list[Any] = []
        self.features: Any = None

    def answer(self, question: str, clock: Clock) -> list[int]:
        """Ids of the answer."""
        import torch

        from minigpt4.common.types import Turn

        encoder = self.model.encoder
        with torch.no_grad():
            if self.features is None:
                self.features = self.model.vision_features(self.image_processor(self.picture)[None])
            text = f"{question} " if self.history else f"<Img><ImageHere></Img> {question} "
            prompt = encoder.encode_prompt(self.history, text)
            ids = torch.tensor([prompt.ids])
            generated = self.lm.generate(
                inputs_embeds=self.model.embed(ids, self.features, encoder.num_image_tokens),
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens,
                min_new_tokens=self.tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=encoder.tokenizer.eos_id,
                pad_token_id=encoder.tokenizer.pad_id,
                streamer=first_token(clock),
            )
        answer: list[int] = generated[0].tolist()
        self.history.append(Turn(text, encoder.tokenizer.decode(answer)))
        return answer


def first_token(clock: Clock) -> Any:
    """A streamer that tells the clock."""
    from transformers.generation.streamers import BaseStreamer

    class Timer(BaseStreamer):
        def put(self, value: Any) -> None:
            if value.numel():
                clock.token()

        def end(self) -> None:
            pass

    return Timer()


def summarise(runs: Sequence[dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians per turn and the gated ratios."""

    def medians(variant: str, key: str) -> list[float]:
        return [statistics.median(run[variant][turn][key] for run in runs) for turn in range(len(QUESTIONS))]

    def totals(variant: str, key: str) -> list[float]:
        return [sum(turn[key] for turn in run[variant]) for run in runs]

    first = {variant: medians(variant, "first_token") for variant in VARIANTS}
    decode = {variant: medians(variant, "decode") for variant in VARIANTS}
    plain = totals("plain", "decode")

    def tokens_ratio(variant: str) -> float:
        return statistics.median(other / own for own, other in zip(totals(variant, "decode"), plain, strict=True))

    return {
        "first_token_s": first,
        "decode_s": decode,
        "first_token_ratio": first["ours"][4] / first["ours"][0],
        "plain_first_token_ratio": first["plain"][4] / first["plain"][0],
        "tokens_ratio": tokens_ratio("ours"),
        "merged_tokens_ratio": tokens_ratio("merged"),
        "static_tokens_ratio": tokens_ratio("static"),
        "conversation_ratio": statistics.median(
            other / own for own, other in zip(totals("ours", "turn"), totals("plain", "turn"), strict=True)
        ),
        "plain_spread": [min(plain) / statistics.median(plain), max(plain) / statistics.median(plain)],
    }


def report(figures: dict[str, Any]) -> None:
    """The figures as lines."""
    print("the same greedy ids in every turn")
    for key, title in (("first_token_s", "CPU-seconds to the first token"), ("decode_s", "CPU-seconds of the rest")):
        for variant in VARIANTS:
            values = "  ".join(f"{seconds:6.3f}" for seconds in figures[key][variant])
            print(f"{title:<31} {variant:<6} turns 1-6: {values}")
    print(
        f"first token, turn 5 over turn 1: ours {figures['first_token_ratio']:.2f} (gate <= 1.2), "
        f"plain {figures['plain_first_token_ratio']:.2f}"
    )
    low, high = figures["plain_spread"]
    print(
        f"tokens/s after the first token, ours over plain: {figures['tokens_ratio']:.3f} (gate >= 1.0; "
        f"plain against itself {low:.2f} to {high:.2f})"
    )
    print(
        f"the same with LoRA folded in: {figures['merged_tokens_ratio']:.3f}; and in memory that stays in place, not "
        f"compiled: {figures['static_tokens_ratio']:.3f}"
    )
    print(f"tokens/s of the whole conversation, ours over plain: {figures['conversation_ratio']:.2f}")


if __name__ == "__main__":
    sys.exit(main())
