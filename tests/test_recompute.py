"""What is computed twice changes memory and time, never a number."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minigpt4.common.dist import DistContext, single
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import RunConfig
from minigpt4.common.types import Sample, Turn
from minigpt4.datasets.collate import collate_packed, collate_padded
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.weights import canonical_name
from minigpt4.runners.parts import build_model
from minigpt4.tools.live_memory import LiveMemory
from minigpt4.tools.planner.choice import choose, passes_for_auto, ranks_of, settle_recompute
from minigpt4.tools.planner.estimate import FRAGMENTS, Planner
from minigpt4.tools.planner.skeleton import POLICIES, Variant, configured_variant
from minigpt4.tools.planner.split import Ranks
from minigpt4.tools.planner.workload import Row, SampleShape, SetLengths, make_window
from tests.plan_parts import language_model as language_model
from tests.plan_parts import model_config, run_config
from tests.tiny_backbones import FAMILIES, write_llm

CPU = torch.device("cpu")


def model_with(policy: str, language_model: Path, **changes: object) -> GenerationMixin:
    cfg = run_config(model_config(language_model, "minigpt_v2", lora_dropout=0.3, **changes), recompute=policy)
    model = build_model(cfg, CPU, torch.float32).train()
    for name, parameter in model.trainable_parameters_by_name():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def results(model: GenerationMixin, packed: bool) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients of a batch; bytes alive between forward and backward."""
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    turns = [(Turn("<Img><ImageHere></Img> Who?", text),) for text in ("A woman with a red hat.", "Nobody.")]
    samples = [Sample(turn, (image,), "") for turn, image in zip(turns, images, strict=True)]
    batch = collate_packed(samples, model.encoder, 1 << 12)[0] if packed else collate_padded(samples, model.encoder)
    torch.manual_seed(1)  # dropout
    with LiveMemory() as memory:
        loss = model(batch).loss_sum
        held = memory.alive
        loss.backward()
    grads = {name: p.grad for name, p in model.trainable_parameters_by_name() if p.grad is not None}
    return {"loss": loss.detach(), **grads}, held


@pytest.mark.parametrize("packed", [True, False])
def test_losses_and_gradients_are_those_without_recomputation(packed: bool, language_model: Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]  # dropout within the recomputed part too
    found = []
    for policy in ("none", "mlp", "full"):
        torch.manual_seed(7)
        found.append(results(model_with(policy, language_model, lora_target_modules=targets), packed))
    assert len(found[0][0]) == 3 + 2 * 3 * 4 and all(value.abs().sum() > 0 for value in found[0][0].values())
    for values, _ in found[1:]:
        for name, value in found[0][0].items():
            assert torch.equal(values[name], value), name
    held = [size for _, size in found]
    assert held[2] < held[1] < 0.75 * held[0]


def test_names_and_settings_of_a_model_stay_as_they_are(language_model: Path) -> None:
    plain, recomputed = (model_with(policy, language_model) for policy in ("none", "mlp"))
    assert [name for name, _ in recomputed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert recomputed.state_dict().keys() == plain.state_dict().keys()
    trained = {canonical_name(name) for name, p in recomputed.named_parameters() if p.requires_grad}
    assert trained == set(recomputed.trainable_state()) - {n for n, _ in recomputed.frozen_without_file()}


def test_nothing_is_recomputed_without_gradients(language_model: Path) -> None:
    plain, recomputed = (model_with(policy, language_model).eval() for policy in ("none", "mlp"))
    recomputed.load_state_dict(plain.state_dict())
    embeddings = torch.randn(1, 9, plain.hidden_size)
    with torch.no_grad():
        first, second = (model.hidden_states(embeddings, torch.arange(9)[None], (9,)) for model in (plain, recomputed))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_language_models_computes_the_same(family: str, tmp_path: Path) -> None:
    path = write_llm(tmp_path, FAMILIES[family])
    found = []
    for policy in ("none", "mlp"):
        torch.manual_seed(7)
        found.append(results(model_with(policy, path, lora_r=0), packed=False)[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_what_is_chosen_for_the_gpu_is_not_left_to_the_model(language_model: Path) -> None:
    cfg = run_config(model_config(language_model, "minigpt_v2"))
    cfg = replace(cfg, run=RunConfig(recompute="auto"))
    with pytest.raises(ConfigError, match="settled by minigpt4 train"):
        build_model(cfg, torch.device("meta"), torch.float32)


def test_auto_takes_what_costs_least_time_and_fits(language_model: Path) -> None:
    cfg = run_config(model_config(language_model, "minigpt_v2"), device="auto", recompute="auto")
    planner, row = Planner(cfg, on_gpu=True), Row(4, SampleShape(1, 16, 14, 40), True, False, "")
    needed = {p: planner.estimate(Variant("bf16", "as is", p), row).total * (1 + FRAGMENTS) for p in POLICIES}
    chosen = {p: choose(planner, row, int(size) + 1) for p, size in needed.items()}
    assert {p: policy for p, (policy, _) in chosen.items()} == {p: p for p in POLICIES}
    assert choose(planner, row, 1)[0] == "full"


def test_auto_takes_what_fits_with_pixels_and_with_features_where_the_run_decides_later(language_model: Path) -> None:
    cfg = run_config(model_config(language_model, "minigpt_v2", cache_vision="auto"), device="auto", max_epoch=2)
    planner, row = Planner(cfg, on_gpu=True), Row(4, SampleShape(1, 16, 14, 40), True, False, "")
    pixels = configured_variant(cfg, on_gpu=True)
    cached = replace(pixels, cached=True)
    assert not pixels.cached and planner.estimate(cached, row).total < planner.estimate(pixels, row).total
    size = int(planner.estimate(cached, row).total * (1 + FRAGMENTS)) + 1
    assert choose(planner, row, size, [cached])[0] == "none" != choose(planner, row, size, [pixels, cached])[0]
    sets = [SetLengths("faces", 2, 1.0, row.shape, row.shape, "", None)]
    model, window = planner.skeleton(pixels), make_window(cfg, sets, 1)
    assert passes_for_auto(cfg, model, sets, window) == 2
    assert passes_for_auto(replace(cfg, run=RunConfig(max_epoch=1)), model, sets, window) == 0
    counted = replace(cfg, run=RunConfig(iters_per_epoch=50))  # of how many samples is unknown
    assert passes_for_auto(counted, model, sets, make_window(counted, sets, 1)) == 0
    sized = [replace(sets[0], size=20)]
    assert passes_for_auto(counted, model, sized, make_window(counted, sized, 1)) == 5 * counted.run.max_epoch


def test_the_ranks_of_a_run_are_those_of_its_nodes_where_each_holds_a_copy(
    language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    model, dist = model_config(language_model, "minigpt_v2"), DistContext(0, 8, 0, CPU)
    for over, shards in (("world", 8), ("node", 4)):
        cfg = run_config(model, parallel="fsdp", shard_over=over)
        assert ranks_of(cfg, dist).shards(cfg.run) == shards
    whole = run_config(model)
    assert ranks_of(whole, dist) == Ranks(8) and ranks_of(whole, dist).shards(whole.run) == 1


def test_auto_is_none_on_a_cpu_and_says_why_on_a_gpu(
    language_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = {"faces": {"format": "vqa", "build_info": {"ann_path": "nowhere.csv"}}}
    cfg = run_config(model_config(language_model, "minigpt_v2"), datasets, device="auto", recompute="auto")
    assert settle_recompute(cfg, single("cpu")).run.recompute == "none"
    small = SimpleNamespace(total_memory=10**8)  # less than the CUDA context
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    with caplog.at_level(logging.INFO, "minigpt4"):
        settled = settle_recompute(cfg, DistContext(0, 1, 0, torch.device("cuda")))
    assert settled.run.recompute == "full"
    assert "run.recompute auto: full; predicted peak 0." in caplog.text
