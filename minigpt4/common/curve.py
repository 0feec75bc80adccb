"""The picture of a training run, drawn from its log.txt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from minigpt4.common.files import writing
from minigpt4.common.logger import LOG_FILE, read_log

CURVE_FILE = "training_curve.png"


def draw_curve(job_dir: Path) -> None:
    """``training_curve.png`` from log.txt: loss (raw, smoothed), learning rate, throughput; no records, no file."""
    path = job_dir / LOG_FILE
    rows = [row for row in read_log(path) if "loss" in row] if path.is_file() else []
    if not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")  # without pyplot: Agg, no display, no global state
    loss, rate, speed = figure.subplots(3, 1, sharex=True)
    windows = [row["window"] for row in rows]
    loss.plot(windows, [row["loss"] for row in rows], alpha=0.35, label="window")
    loss.plot(windows, smoothed([row["loss"] for row in rows]), label="smoothed")
    checks = [row for row in read_log(path) if row.get("event") == "validation" and "val_loss" in row]
    if checks:
        loss.plot([row["window"] for row in checks], [row["val_loss"] for row in checks], "o-", label="validation")
    loss.set_ylabel("loss per target token")
    loss.legend()
    rate.plot(windows, [row["lr"] for row in rows])
    rate.set_ylabel("learning rate")
    speed.plot(windows, [row["samples_per_s"] for row in rows])
    speed.set_ylabel("samples / s")
    speed.set_xlabel("window (optimiser steps)")
    draft = job_dir / f".{CURVE_FILE}"
    with writing(draft):
        figure.savefig(draft, format="png")
        os.replace(draft, job_dir / CURVE_FILE)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the start's bias (Kingma & Ba 2015, section 3)."""
    mean, smooth = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - weight**count))
    return smooth
