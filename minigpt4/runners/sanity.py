"""Checks that tell a broken run from a good one before hours are spent. ``run.sanity``: raise, warn or off."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.schema import Config
from minigpt4.common.yaml_source import Problems, read_source
from minigpt4.conversation.encoding import Encoder
from minigpt4.runners.overview import Survey

log = logging.getLogger(__name__)

_LEAST_SUPERVISED = 0.01
_MOST_CUT = 0.05
_AT_CHANCE = 0.03
"""How near ln(V), relatively, a first loss must be to look like guessing."""


class SanityError(MiniGPT4Error):
    """A run that cannot learn what it is meant to."""


def report(mode: str, messages: Sequence[str]) -> None:
    """Raises SanityError with all ``messages``, or warns, as ``run.sanity`` says."""
    if not messages or mode == "off":
        return
    if mode == "raise":
        hint = "run.sanity: warn goes on all the same"
        raise SanityError("\n".join([*messages, hint]))
    for message in messages:
        log.warning("sanity: %s", message)


def check_labels(surveys: Sequence[Survey], encoder: Encoder) -> list[str]:
    """What is wrong with the labels of the records looked at."""
    messages = []
    for item in surveys:
        text_tokens = item.tokens - item.image_tokens
        if item.supervised < _LEAST_SUPERVISED * text_tokens:
            share = 100 * item.supervised / max(text_tokens, 1)
            messages.append(
                f"data set '{item.name}': {share:.2f} % of the text positions are supervised (least: "
                f"{100 * _LEAST_SUPERVISED:.0f} %); answers are empty, or prompts are far longer than answers"
            )
        elif item.ended == 0:
            why = "every answer is cut by max_txt_len" if item.cut else "model.end_sym"
            messages.append(
                f"data set '{item.name}': no label of {item.looked_at} records holds the end symbol "
                f"{encoder.end_sym!r} ({why}); a model trained on them never stops"
            )
    if not encoder.end_sym:
        messages.append("model.end_sym is empty; a model trained without an end symbol never stops")
    return messages


def warn_of_cuts(surveys: Sequence[Survey]) -> None:
    """Warns when many answers lose their end to ``max_txt_len``."""
    for item in surveys:
        if item.cut > _MOST_CUT * item.looked_at:
            log.warning(
                "data set '%s': %d of %d answers are cut by model.max_txt_len and never learn to end; raise it",
                item.name, item.cut, item.looked_at,
            )  # fmt: skip


def check_first_loss(loss: float, vocab_size: int) -> list[str]:
    """A first loss at ln(V) is that of guessing: the language model's weights are random."""
    chance = math.log(vocab_size)
    if abs(loss - chance) > _AT_CHANCE * chance:
        return []
    return [
        f"the first loss {loss:.2f} is that of guessing (ln of {vocab_size} words = {chance:.2f}): the weights of "
        "model.llama_model look random, or its tokenizer belongs to another model; "
        "model.llama_weights: random says that this is meant"
    ]


def check_image_size(cfg: Config) -> list[str]:
    """Initial weights from a checkpoint of ours that was trained on pictures of another size."""
    if not cfg.model.ckpt or not Path(cfg.model.ckpt).is_dir():
        return []
    path = read_checkpoint(cfg.model.ckpt).config_path
    model = read_source(path, Problems()).data.get("model")
    size = model.get("image_size") if isinstance(model, dict) else None
    if size in (None, cfg.model.image_size):
        return []
    return [
        f"model.image_size is {cfg.model.image_size}, but the weights of model.ckpt were trained at {size} "
        f"({cfg.model.ckpt}); the projection has never seen features of this size"
    ]
