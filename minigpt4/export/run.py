"""One export from beginning to end: refuse early, write, read back, compare, describe, rename."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt4.chat.loading import Assistant
from minigpt4.chat.session import open_image
from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.types import IMAGE_TAG, IMAGE_TOKEN
from minigpt4.export.adapter import Adapter
from minigpt4.export.blip2 import Blip2
from minigpt4.export.card import write_card
from minigpt4.export.example import NUM_GREEDY, Example, Outputs, compare, make_example, outputs_of_model
from minigpt4.export.hf import HuggingFace
from minigpt4.export.merged import Merged
from minigpt4.export.output import MARKER, check_destination, draft_of, publish, size_of, write_json
from minigpt4.export.parts import cast, dtype_name, other_tensors, stored_dtype
from minigpt4.export.prompt import bos_id, endings, prompt_text
from minigpt4.export.pth import Pth
from minigpt4.export.source import Source
from minigpt4.export.target import Facts, Target
from minigpt4.models.weights import part_of

TARGETS: dict[str, Target] = {target.name: target for target in (Pth(), Adapter(), Merged(), HuggingFace(), Blip2())}


@dataclass(frozen=True)
class Wishes:
    """What a user may choose besides the source and the target."""

    out: Path
    force: bool = False
    dtype: str = "auto"
    image: str | None = None
    question: str | None = None
    seed: int = 0


def export(source: Source, target: Target, wishes: Wishes) -> None:
    """Write ``source`` as ``target`` to ``wishes.out``; nothing is left there when anything goes wrong.

    In memory: the model in float32 (4 bytes per parameter: 32 GB for 7 B with its vision tower), then, after it was
    freed, what was written, in float32 too. Never both; a file of at most 5 GB comes on top. Raises MiniGPT4Error.
    """
    out = Path(os.path.abspath(wishes.out))  # "." and ".." have no name to write beside
    is_file = target.name == "pth" and out.suffix == ".pth"
    target.refuse(source)
    check_destination(out, wishes.force)
    if wishes.image is not None:
        open_image(wishes.image)  # a wrong path is told before weights load
    if IMAGE_TAG in (wishes.question or ""):
        raise ConfigError(f"--question must not hold {IMAGE_TAG}: the picture of the check is put in front of it")
    with draft_of(out) as draft:
        dtype = stored_dtype(source.model, wishes.dtype) if target.casts else torch.float32
        example, wanted, facts, rounding = _write(source, target, wishes, draft, dtype)
        gc.collect()  # the first model leaves before the second one comes
        say("checking", f"{size_of(draft)}, read back from the files")
        found = target.reload(source, draft, example)
        verdict = compare(wanted, found, f"--to {target.name}{target.hint}", is_relative=target.casts)
        say("equal", verdict)
        if is_file:
            publish(next(draft.glob("*.pth")), out)
        else:
            check = f"The files were read back and answer one question about one picture as the model does: {verdict}."
            write_card(draft, source, target, facts, " ".join(filter(None, [check, rounding])))
            write_json(draft / MARKER, _marker(source, target, facts, verdict))
            publish(draft, out)
    say("wrote", f"{wishes.out} ({size_of(out)})")


def say(step: str, text: str) -> None:
    """One line of progress."""
    print(f"{step:<10} {text}", flush=True)


def _write(
    source: Source, target: Target, wishes: Wishes, draft: Path, dtype: torch.dtype
) -> tuple[Example, Outputs, Facts, str]:
    """Load, answer the example, write. Returns what the files must answer too; the model is gone afterwards."""
    say("loading", f"{source.title} in float32")
    if source.is_quantised:
        say("note", "low_resource and load_in_4bit are left out: answers with full weights may differ a little")
    assistant = source.load()
    model = assistant.model
    example = make_example(assistant, wishes.image, wishes.question, wishes.seed)
    picture = f"a drawn picture (seed {wishes.seed})" if wishes.image is None else str(wishes.image)
    say("example", f"{picture}: {example.question}")
    wanted = outputs_of_model(model, example, with_vision=True)
    facts = _facts(assistant, example, dtype)
    say("writing", f"--to {target.name}{f', {dtype_name(dtype)}' if target.casts else ''}")
    target.write(source, assistant, draft, dtype)
    if dtype == torch.float32:
        return example, wanted, facts, ""
    cast(model, torch.float32)  # the same numbers as in the files, in exact arithmetic
    rounded = outputs_of_model(model, example, with_vision=target.has_vision)
    return example, rounded, facts, _rounding(wanted, rounded, dtype)


def _rounding(exact: Outputs, rounded: Outputs, dtype: torch.dtype) -> str:
    """A sentence on what storing in half precision changes. Raises CheckpointError when numbers overflow."""
    name = dtype_name(dtype)
    if not bool(torch.isfinite(rounded.logits).all()):
        raise CheckpointError(f"weights do not fit into {name}: the logits are not finite; use --dtype float32")
    difference = float((exact.logits - rounded.logits).abs().max())
    largest = float(exact.logits.abs().max())
    same = sum(a == b for a, b in zip(exact.ids, rounded.ids, strict=True))
    text = (
        f"Storing the weights in {name} changes logits by up to {difference:.2g} (largest logit {largest:.2g}); "
        f"{same} of {NUM_GREEDY} greedy ids stay the same."
    )
    say("rounding", text)
    return text


def _facts(assistant: Assistant, example: Example, dtype: torch.dtype) -> Facts:
    model = assistant.model
    text = prompt_text(assistant, example.question)
    before, after = (model.encoder.tokenizer.encode(part) for part in text.split(IMAGE_TAG))
    has_bos = bos_id(assistant) is not None
    spelled = [*before, *[IMAGE_TOKEN] * model.encoder.num_image_tokens, *after]
    assert example.ids[int(has_bos) :] == spelled, "the prompt of the card is not the prompt of the chat"
    trained: dict[str, int] = {}
    for name, parameter in model.trainable_parameters_by_name():
        trained[part_of(name)] = trained.get(part_of(name), 0) + parameter.numel()
    return Facts(
        num_image_tokens=model.encoder.num_image_tokens,
        feature_width=int(example.features.shape[-1]),
        dtype=dtype,
        prompt=text,
        has_bos=has_bos,
        stop=tuple(endings(assistant)[0]),
        trained=trained,
        has_other_tensors=bool(other_tensors(model)),
    )


def _marker(source: Source, target: Target, facts: Facts, verdict: str) -> dict[str, object]:
    from importlib.metadata import version

    return {
        "to": target.name,
        "source": source.title,
        "dtype": dtype_name(facts.dtype),
        "check": verdict,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
    }
