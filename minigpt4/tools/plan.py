"""``minigpt4 plan``: memory of a training run before it is started, from its configuration alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError
from minigpt4.common.files import write_atomically

if TYPE_CHECKING:
    from minigpt4.common.schema import Config
    from minigpt4.models.generation import GenerationMixin
    from minigpt4.tools.planner.estimate import Estimate, Planner
    from minigpt4.tools.planner.proposal import Work
    from minigpt4.tools.planner.report import Report
    from minigpt4.tools.planner.split import Ranks
    from minigpt4.tools.planner.workload import Row

_REFERENCES = ("upstream", "fork")


def main(argv: Sequence[str]) -> int:
    """Print the plan; 0, or 1 when the run does not fit ``--gpu``. Raises MiniGPT4Error for mistakes of the user."""
    given = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from minigpt4 import catalog
    from minigpt4.common.config import load_config
    from minigpt4.tools.planner.skeleton import language_model_files

    catalog.load()
    cfg = load_config(given.cfg_path, given.options, check_data=False, check_weights=False)
    with language_model_files(cfg, given.llm_shape) as cfg:
        return run(cfg, given)


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 plan``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 plan",
        description="Predict the GPU memory of a training run from its configuration: no weights, no data, no GPU.",
        epilog="examples:\n"
        "  minigpt4 plan --cfg-path train_configs/minigptv2_finetune_gpt4vision.yaml --gpu 24 --answer-tokens 120\n"
        "  minigpt4 plan --cfg-path my.yaml --llm-shape llama2-13b --options model.load_in_4bit=True\n"
        "  minigpt4 plan --cfg-path my.yaml --gpus 8 --gpu 80 --options run.parallel=fsdp\n"
        "  minigpt4 plan --cfg-path my.yaml --model-reference fork\n"
        "  minigpt4 plan --cfg-path my.yaml --probe",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cfg-path", required=True, metavar="FILE", help="YAML file with model, datasets and run")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
    parser.add_argument(
        "--gpu", type=_positive, metavar="GB", help="size of the card; what does not fit gets a proposal"
    )
    parser.add_argument(
        "--gpus", "--ranks", type=int, default=1, metavar="N",
        help="number of GPUs: the effective batch, and what fsdp splits the model over",
    )  # fmt: skip
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: all; counts for shard_over: node")
    parser.add_argument("--answer-tokens", type=int, metavar="N", help="default: measured, else max_txt_len")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="without image and BOS; default: measured, else 30"
    )
    parser.add_argument("--llm-shape", default="", metavar="NAME", help="llama2-7b, vicuna-13b, ...: needs no files")
    parser.add_argument("--model-reference", choices=_REFERENCES, help="the memory of a published loop, by formula")
    parser.add_argument("--probe", action="store_true", help="run two optimiser steps and print what they took")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def run(cfg: Config, given: argparse.Namespace) -> int:
    """The plan of a configuration whose language model is known."""
    from minigpt4.tools.planner import report
    from minigpt4.tools.planner.choice import choose, passes_for_auto
    from minigpt4.tools.planner.estimate import Planner, usable_bytes
    from minigpt4.tools.planner.larger import enlarge
    from minigpt4.tools.planner.proposal import propose
    from minigpt4.tools.planner.skeleton import configured_variant

    planner = Planner(cfg, cfg.run.device != "cpu", find_ranks(given))
    variant = configured_variant(cfg, planner.on_gpu, planner.ranks)
    if given.probe and variant.shards > 1:
        raise ConfigError("--probe runs one process, which holds a whole model; it cannot measure run.parallel: fsdp")
    work, row = find_work(planner, planner.skeleton(variant), given)
    passes = passes_for_auto(cfg, planner.skeleton(variant), work.sets, work.window)
    variant = replace(variant, cached=variant.cached or passes > 0)
    if cfg.run.recompute == "auto" and given.gpu:
        variant = replace(variant, recompute=choose(planner, row, usable_bytes(given.gpu), [variant])[0])
    estimate = planner.estimate(variant, row)
    result = report.start(str(given.cfg_path), planner, work.window, estimate)
    if passes:
        result.sections.append(report.auto_cache_text(passes))
    code = 0
    if given.gpu:
        code = int(estimate.verdict(given.gpu) == "no")
        report.add_proposals(result, given.gpu, estimate, propose(planner, work, estimate, given.gpu) if code else [])
        report.add_larger(result, None if code else enlarge(planner, work, estimate, given.gpu))
    if given.model_reference:
        add_reference(result, given.model_reference, planner, work, estimate)
    if given.probe:
        add_probe(result, given, cfg, estimate)
    result.show(sys.stdout.isatty())
    if given.json:
        write_atomically(given.json, json.dumps(result.facts, indent=1))
    return code


def find_work(planner: Planner, model: GenerationMixin, given: argparse.Namespace) -> tuple[Work, Row]:
    """Lengths, window and the fullest row of the run. Raises ConfigError for flags that make no sense."""
    from minigpt4.tools.planner.lengths import Assumed, find_rows
    from minigpt4.tools.planner.proposal import Work

    if given.answer_tokens is not None and given.answer_tokens < 1:
        raise ConfigError(f"--answer-tokens must be >= 1, got {given.answer_tokens}")
    assumed = Assumed(given.prompt_tokens, given.answer_tokens, can_encode=not given.llm_shape)
    sets, window, row = find_rows(planner.cfg, model, assumed, given.gpus)
    return Work(sets, window), row


def find_ranks(given: argparse.Namespace) -> Ranks:
    """The GPUs that the flags name. Raises ConfigError for numbers that do not go together."""
    from minigpt4.tools.planner.split import Ranks

    for flag, value in (("gpus", given.gpus), ("gpus-per-node", given.gpus_per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} must be >= 1, got {value}")
    if given.gpus_per_node and given.gpus % given.gpus_per_node:
        raise ConfigError(f"--gpus {given.gpus} do not divide into nodes of {given.gpus_per_node} (--gpus-per-node)")
    return Ranks(given.gpus, given.gpus_per_node or 0)


def add_reference(result: Report, kind: str, planner: Planner, work: Work, estimate: Estimate) -> None:
    """The same samples through a published loop: one padded micro-batch."""
    from minigpt4.models.llm import causal_lm
    from minigpt4.tools.planner import reference, report
    from minigpt4.tools.planner.workload import fullest_row

    row = fullest_row(work.sets, work.window, False, 0)
    config = causal_lm(planner.skeleton(estimate.variant).llama_model).config
    items = reference.reference_account(kind, estimate.parts, config, row)
    title = f"{row.samples} x {row.shape.text}"
    result.sections += [report.reference_table(kind, items, title), reference.explanation(kind)]
    result.facts["reference"] = {"kind": kind, **{item.name: item.bytes for item in items}}
    result.facts["reference"]["total"] = sum(item.bytes for item in items)


def add_probe(result: Report, given: argparse.Namespace, cfg: Config, estimate: Estimate) -> None:
    """Prediction beside measurement."""
    from minigpt4.common.config import load_config
    from minigpt4.tools.planner import probe, report

    dist = probe.find_device(cfg.run.device != "cpu")
    try:
        load_config(given.cfg_path, given.options, check_data=False)
        has_weights = not given.llm_shape
    except ConfigError:  # told one by one when training starts; here random weights measure the same
        has_weights = False
    row = replace(estimate.row, adds_up=estimate.step.gradients > 0)  # DDP's buckets stand for an earlier row
    measured = probe.measure(cfg, estimate.variant, row, has_weights, dist)
    result.sections.append(report.probe_text(estimate, measured, has_weights))
    result.facts["measured"] = measured
