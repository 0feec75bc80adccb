"""Benchmarks: command lines, the list of ``make bench``, and the arithmetic behind their figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import charts, data_growth, gpu_real_size, gpu_worker, memory_growth, packing, shared
from benchmarks.flops import Decoder, Tower, step_flops
from minigpt4.common.types import Batch

FOLDER = Path(shared.__file__).parent
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if "def main(argv" in path.read_text())
SEVEN_B, ADAPTED = Decoder(4096, 32, 11008, 32000), Decoder(4096, 32, 11008, 32000, 64)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_benchmark_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in (["--out"] if name == "charts" else ["--quick", "--json"]))


def test_make_bench_runs_every_benchmark() -> None:
    lines = (FOLDER.parent / "Makefile").read_text().split("\nbench:")[1]
    assert [name for name in PROGRAMS if name not in lines] == []


def test_the_reference_pads_contexts_and_answers_apart() -> None:
    assert packing.reference_positions([10, 4], [3, 20]) == 2 * (10 + 20)


def test_lengths_stay_within_their_bounds() -> None:
    rng = packing.Random(0)
    drawn = [packing.log_normal(rng, 14, 2.0, 6, 60) for _ in range(500)]
    assert min(drawn) == 6 and max(drawn) == 60 and 10 < sorted(drawn)[250] < 20


def test_packed_rows_hold_no_padding_and_the_reference_s_rows_most() -> None:
    found = packing.count(packing.mixed, 32, 6, 96)
    assert found["packed"] == 1.0 > found["padded"] > found["reference"] > 0.3


@pytest.mark.parametrize(
    ("tower", "decoder", "sample", "expected"),
    [
        (Tower(1408, 39, 6144, 257, behind=12.7e9), SEVEN_B, (53, 21), 1.92e12),
        (Tower(1408, 39, 6144, 257, behind=12.7e9), SEVEN_B, (218, 160), 6.31e12),
        (Tower(1408, 39, 6144, 1025), ADAPTED, (407, 120), 13.11e12),
        (None, ADAPTED, (407, 120), 10.86e12),
    ],
)
def test_operations_of_published_shapes(
    tower: Tower | None, decoder: Decoder, sample: tuple[int, int], expected: float
) -> None:
    assert step_flops(tower, decoder, [sample]) == pytest.approx(expected, rel=0.005)


def test_a_slope_is_taken_between_the_two_longest_answers() -> None:
    cells = [{"vocabulary": 8, "tokens": n, "bytes": {"ours": 10 * n, "reference": n * n}} for n in (300, 20, 100)] + [
        {"vocabulary": 9, "tokens": 500, "bytes": {"ours": 0, "reference": 0}}
    ]
    assert memory_growth.slope_of(cells, 8) == {
        "vocabulary": 8, "from": 100, "to": 300, "ours": 10, "reference": (300**2 - 100**2) / 200,
    }  # fmt: skip


def test_growth_compares_the_largest_data_set_with_the_smallest() -> None:
    cells = [{"records": n, "draw_us": 1.0, "read_us": us} for n, us in ((1000, 5.0), (10, 1.0), (100, 9.0))]
    assert data_growth.growth(cells) == 3.0


def test_samples_of_packed_and_of_padded_rows_are_told_apart() -> None:
    def batch(labels: list[list[int]], lengths: tuple[int, ...]) -> Batch:
        rows = torch.tensor(labels)
        return Batch(torch.zeros_like(rows), torch.zeros_like(rows), rows, torch.zeros(0), lengths, 3)

    packed = batch([[-100, 5, -100, -100, 6, 7]], (2, 4))
    padded = batch([[-100, 5, -100, -100], [-100, -100, 6, 7]], (2, 4))
    assert gpu_worker.sample_lengths([packed]) == gpu_worker.sample_lengths([padded]) == [(2, 1), (4, 2)]


def test_a_full_card_is_told_from_other_errors() -> None:
    assert gpu_worker.is_out_of_memory(torch.OutOfMemoryError("full"))
    assert gpu_worker.is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not gpu_worker.is_out_of_memory(RuntimeError("shapes differ"))


def row(name: str, loop: str, size: int, **figures: Any) -> dict[str, Any]:
    more = {"cap_24gb": "24" in name, "nf4": False}
    return {"workload": "v2", "name": name, "loop": loop, "micro_batch": size, **more, **figures}


def measured(speed: float, loss: float = 10.0) -> dict[str, Any]:
    return {"step_s": 1.0, "samples_per_s": speed, "flops_per_s": speed, "peak_bytes": 10, "first_loss": loss}


def test_no_ratio_is_given_to_a_variant_with_another_loss() -> None:
    rows = [row("reference", "reference", 6, **measured(1.0)), row("ours", "ours", 6, **measured(3.0))]
    rows += [row("wrong", "ours", 6, **measured(9.0, loss=11.0)), row("ours", "ours", 16, oom=True)]
    gpu_real_size.compare(rows, {"device": "some GPU", "product_flops": 4.0})
    assert [one.get("ratio") for one in rows] == [1.0, 3.0, None, None]
    assert rows[1]["mfu"] == 0.75 and gpu_real_size.misses(rows) == []


def test_missed_gates_of_real_size_are_named() -> None:
    rows = [row("reference", "reference", 6, **measured(1.0)), row("ours", "ours", 6, **measured(1.5))]
    rows += [row("ours in 24 GB", "ours", 2, **measured(1.0)), row("ours in 24 GB", "ours", 4, oom=True)]
    gpu_real_size.compare(rows, {"device": "some GPU", "product_flops": 3.0})
    ratio, mfu, capped = gpu_real_size.misses(rows)
    assert "1.50" in ratio and "0.50" in mfu and "in 24 GB 2" in capped


def test_tiny_and_quick_runs_take_few_micro_batches() -> None:
    ours = next(v for v in gpu_real_size.VARIANTS if v.name == "ours")
    assert gpu_real_size.sizes_of(ours, "tiny", False) == [1, 4]
    assert gpu_real_size.sizes_of(ours, "real", True) == [1, 4]


def test_charts_are_drawn_from_the_figures_that_are_there(tmp_path: Path) -> None:
    rungs = [{"name": "a < b", "time_ratio": 1.0, "memory_ratio": 0.5}]
    cells = [
        {"vocabulary": v, "tokens": n, "bytes": {"ours": n, "reference": v * n}} for v in (8000, 32000) for n in (1, 9)
    ]
    for name, figures in (("wastes", {"rungs": rungs}), ("memory_growth", {"cells": cells})):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    assert charts.main([str(tmp_path), "--out", str(tmp_path / "drawn")]) == 0
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["memory_growth.svg", "wastes.svg"]
    texts = [[node.text for node in ElementTree.parse(path).iter() if node.tag.endswith("text")] for path in drawn]
    assert "8k words, ours" in texts[0] and {"a < b", "0.50"} <= set(texts[1])
    assert charts.main([str(tmp_path / "drawn")]) == 1


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    assert charts.spread_out([50, 10, 12], least=16) == [50, 10, 26]


@pytest.mark.parametrize(("least", "most"), [(20, 1024), (1, 1e6), (9.0, 700.0), (3.0, 3.0)])
def test_ticks_lie_on_their_axis(least: float, most: float) -> None:
    scale = charts.Scale(least, most, 0, 100)
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in scale.ticks())


@pytest.mark.parametrize(
    ("values", "ends"), [((7.5, 645), (5, 1000)), ((24, 60), (10, 100)), ((3, 3), (1, 10)), ((90, 110), (10, 200))]
)
def test_an_axis_spans_a_decade_at_least(values: tuple[float, float], ends: tuple[float, float]) -> None:
    assert charts.around(*values) == pytest.approx(ends)


def test_numbers_on_axes_are_short() -> None:
    assert [charts.short(value) for value in (0.5, 20, 1024, 2e6)] == ["0.5", "20", "1024", "2M"]
