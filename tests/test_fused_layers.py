"""Kernels for norms, rotary embedding and SwiGLU compute what the layers compute, and step aside where they cannot."""

from __future__ import annotations

import inspect
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from minigpt4.common.dist import DistContext, single
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import RunConfig
from minigpt4.common.types import Sample, Turn
from minigpt4.datasets.collate import collate_packed
from minigpt4.models import fused
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.llm import causal_lm
from minigpt4.runners.parts import build_model, settle_layers
from tests.plan_parts import language_model as language_model
from tests.plan_parts import model_config, run_config
from tests.tiny_backbones import FAMILIES, write_llm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
POLICIES = ("none", "mlp", "full")


def build(language_model: Path, policy: str = "none", **changes: Any) -> GenerationMixin:
    """With adapters that do something and dropout in them, in train mode."""
    targets = ["q_proj", "v_proj", "down_proj"]
    cfg = model_config(language_model, "minigpt_v2", lora_dropout=0.3, lora_target_modules=targets, **changes)
    torch.manual_seed(7)
    model = build_model(run_config(cfg, recompute=policy), CPU, torch.float32).train()
    for name, parameter in model.trainable_parameters_by_name():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def choose(wanted: str, model: GenerationMixin, device: torch.device = CPU, micro_batches: int = 1) -> str:
    return fused.choose(wanted, causal_lm(model.llama_model), device, torch.float32, micro_batches).why


def results(model: GenerationMixin) -> dict[str, Tensor]:
    """Loss and gradients of a packed row of two samples."""
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    turns = [(Turn("<Img><ImageHere></Img> Who?", text),) for text in ("A woman with a red hat.", "Nobody.")]
    samples = [Sample(turn, (image,), "") for turn, image in zip(turns, images, strict=True)]
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    loss = model(collate_packed(samples, model.encoder, 1 << 12)[0]).loss_sum
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.trainable_parameters_by_name() if p.grad is not None}}


@pytest.fixture(scope="module", params=["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])])
def models(
    language_model: Path, request: pytest.FixtureRequest
) -> dict[str, tuple[GenerationMixin, dict[str, Tensor], list[str]]]:
    """Compiled models by what they recompute, what they computed before, the names of their weights before.

    aot_eager traces, guards and splits into forward and backward as inductor does, and leaves out the C++ compiler.
    """
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)  # pytest would keep all that the compiler notes
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused._KINDS, "compile", lambda: fused.compiled(request.param))
        patch.setattr(fused, "missing", lambda *_: "")
        for policy in POLICIES:
            model = build(language_model, policy)
            found[policy] = (model, results(model), list(model.state_dict()))
            said = choose("compile", model)
            assert said == "compiled (inductor) for 9 norms, 4 SwiGLU, 4 rotary embeddings; as asked for"
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_losses_and_gradients_with_lora_and_dropout_are_those_of_plain_layers(policy: str, models: Any) -> None:
    model, expected, names = models[policy]
    assert list(model.state_dict()) == names
    counters.clear()
    found = results(model)
    assert not counters["graph_break"] and list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def test_rows_of_other_lengths_are_not_compiled_again(models: Any) -> None:
    model, *_ = models["none"]
    results(model)
    counters.clear()
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        lengths = torch.randint(5, 60, (int(torch.randint(2, 6, (1,), generator=draw)),), generator=draw).tolist()
        embeddings = torch.randn(1, sum(lengths), model.hidden_size, requires_grad=True)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        model.hidden_states(embeddings, positions, lengths).sum().backward()
    assert counters["stats"]["unique_graphs"] == 0 and not counters["graph_break"]
    text = torch.randn(1, 30, model.hidden_size)  # a row without pictures: nothing before the first layer trains
    model.hidden_states(text, torch.arange(15).repeat(1, 2), (15, 15)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 2  # the first norm, and the rotation of the first keys


def test_without_gradients_the_code_of_the_library_runs(language_model: Path, models: Any) -> None:
    compiled, plain = models["none"][0].eval(), build(language_model).eval()
    embeddings, counts = torch.randn(1, 9, plain.hidden_size), counters["stats"]["unique_graphs"]
    with torch.no_grad():
        one, two = (model.hidden_states(embeddings, torch.arange(9)[None], (9,)) for model in (compiled, plain))
    compiled.train()
    assert torch.equal(one, two) and counters["stats"]["unique_graphs"] == counts


def test_auto_is_plain_on_a_cpu(language_model: Path) -> None:
    assert choose("auto", build(language_model)).startswith("plain (on a CPU")


def test_what_is_missing_is_named(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(language_model)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"run.fused_layers: compile does not work here: no C\+\+ compiler .g\+\+."):
        choose("compile", model)
    with pytest.raises(ConfigError, match="liger does not work here: Liger's kernels need a GPU; use auto or none"):
        choose("liger", model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fused.missing("compile", GPU) == "the package triton is not installed"
    assert fused.missing("liger", GPU) == "the package liger-kernel is not installed"


def test_a_family_with_other_layers_is_told(tmp_path: Path) -> None:
    model = build_model(
        run_config(model_config(write_llm(tmp_path, FAMILIES["gpt_neox"]), "minigpt_v2", lora_r=0)), CPU, torch.float32
    )
    with pytest.raises(ConfigError, match="layers of GPTNeoXForCausalLM are not those of a Llama"):
        choose("compile", model)


def test_a_rotation_that_turns_the_other_way_keeps_its_own_code(language_model: Path) -> None:
    attention = next(m for m in build(language_model).modules() if fused._rotates_as_llama(m))
    forward = type(attention).forward
    rotate = inspect.unwrap(forward.__globals__["apply_rotary_pos_emb"])
    turned = {**rotate.__globals__, "rotate_half": lambda x: -x}
    other = {**forward.__globals__, "apply_rotary_pos_emb": FunctionType(rotate.__code__, turned)}
    changed = type("Other", (type(attention),), {"forward": FunctionType(forward.__code__, other)})
    attention.__class__ = changed
    assert not fused._rotates_as_llama(attention)


def test_a_compiler_that_breaks_is_told_by_its_own_words(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> fused.Kernels:
        raise RuntimeError("ld: cannot find -lgomp\nand more")

    monkeypatch.setitem(fused._KINDS, "compile", broken)
    monkeypatch.setattr(fused, "missing", lambda *_: "")
    with pytest.raises(ConfigError, match="compile does not work here: RuntimeError: ld: cannot find -lgomp; use"):
        choose("compile", build(language_model))


def stand_in(**functions: Callable[..., Any]) -> ModuleType:
    """A module in the place of Liger's functions, which need a GPU: the arithmetic is transformers'."""
    kernels = fused.plain()
    module: Any = ModuleType("liger_kernel.transformers.functional")
    module.liger_rms_norm = lambda x, weight, epsilon, in_place: kernels.norm(x, weight, epsilon)
    module.liger_swiglu, module.liger_rope = kernels.swiglu, kernels.rotate
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def use_stand_in(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    monkeypatch.setattr(fused, "missing", lambda *_: "")
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", stand_in(**functions))


def test_a_stand_in_for_liger_is_taken_when_it_is_equal(language_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch)
    model = build(language_model)
    expected = results(model)
    assert choose("liger", model).startswith("Liger kernels for 9 norms")
    for name, value in results(model).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(("name", "broken", "said"), [
    ("liger_rope", lambda query, key, cos, sin: (query, key), "rotated queries differ by"),
    ("liger_swiglu", lambda gate, up: gate.sigmoid().detach() * gate * up, "gradients of the gate differ by"),
])  # fmt: skip
def test_a_stand_in_for_liger_that_computes_something_else_is_refused(
    name: str, broken: Callable[..., Any], said: str, language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch, **{name: broken})
    with pytest.raises(ConfigError, match=said):
        choose("liger", build(language_model))


def test_auto_on_a_gpu_takes_what_works_pays_and_is_faster(
    language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ratios = build(language_model), {"liger": 3.0, "compile": 2.0}
    problems = {"liger": "", "compile": ""}
    monkeypatch.setattr(fused, "problem", lambda name, *_: problems[name])
    monkeypatch.setattr(fused, "times_faster", lambda name, *_: ratios[name])
    monkeypatch.setattr(fused, "_use", lambda name, llm, device, reason: fused.Choice(name, f"{name}: {reason}"))
    long = fused.LONG_RUN
    assert choose("auto", model, GPU) == "liger: 3.0 times as fast as plain here"
    problems["liger"] = "not installed"
    assert choose("auto", model, GPU, long) == "compile: 2.0 times as fast as plain here"
    assert choose("auto", model, GPU, long - 1) == (
        f"plain (liger: not installed; compile: pays in runs of {long} micro-batches, this one has {long - 1})"
    )
    ratios["compile"] = 1.0
    assert choose("auto", model, GPU, long).endswith("compile: 1.0 times as fast as plain here)")
    problems["compile"] = "no triton"
    assert choose("auto", model, GPU, long) == "plain (liger: not installed; compile: no triton)"


def test_a_resumed_run_and_every_rank_compute_as_was_chosen_once(
    language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stand_in(monkeypatch)
    monkeypatch.setattr(fused, "_choose_by_itself", lambda *_: fused.Choice("none", "timed"))
    monkeypatch.setattr(DistContext, "broadcast_object", lambda self, value: value or "liger")
    plan: Any = SimpleNamespace(total_windows=1, accumulation=1)
    run, first, second = RunConfig(), single("cpu"), DistContext(1, 2, 1, CPU)

    def settle(dist: DistContext, before: str, run: RunConfig = run) -> fused.Choice:
        return settle_layers(run, build(language_model), plan, dist, before)

    assert settle(first, "").why == "timed"
    assert settle(first, "liger").why.endswith("4 rotary embeddings; as before the resume")
    assert settle(first, "none").why == "plain (as before the resume)"
    assert settle(second, "").why.endswith("4 rotary embeddings; as on rank 0")
    assert settle(second, "liger", RunConfig(fused_layers="none")).why == "plain (as asked for)"
    monkeypatch.setattr(fused, "missing", lambda *_: "no GPU")
    assert settle(first, "liger") == fused.Choice("none", "plain (liger as before the resume, but here: no GPU)")
