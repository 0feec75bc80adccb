"""Every back end of packed attention gives what samples give by themselves, and one that leaks is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import RunConfig
from minigpt4.models import packing
from minigpt4.models.packing import BACKENDS, Options, Shape, choose, per_sample, problem
from minigpt4.runners.parts import describe_rows
from tests.golden_cases import build_model, encode, images_of, load_case, packed

CPU = torch.device("cpu")
SHAPES = [Shape(4, 4, 16), Shape(6, 2, 8)]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_with_a_mask_gives_values_and_gradients_of_samples_by_themselves(shape: Shape) -> None:
    assert problem("mask", shape, CPU, torch.float32) == ""


@pytest.mark.parametrize("shape", SHAPES)
def test_the_block_mask_of_flex_attention_keeps_samples_apart(shape: Shape) -> None:
    sizes = [(1, heads, 33, shape.width) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    query, key, value = (torch.randn(size) for size in sizes)
    options = Options((5, 19, 1, 8), 0.0, 0.3)  # flex has no backward pass on a CPU: values alone
    torch.testing.assert_close(
        BACKENDS["flex"](query, key, value, options), per_sample(query, key, value, options), rtol=1e-4, atol=1e-5
    )


@GPU
@pytest.mark.parametrize("name", ["varlen", "flex", "mask"])
@pytest.mark.parametrize("shape", [Shape(8, 8, 64), Shape(8, 2, 128)])
def test_back_ends_on_a_gpu(name: str, shape: Shape) -> None:
    assert problem(name, shape, torch.device("cuda"), torch.bfloat16) == ""


def test_a_planted_leak_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(query: Any, key: Any, value: Any, options: Options) -> torch.Tensor:
        return per_sample(query, key, value, Options((sum(options.lengths),), 0.0, options.scale))

    monkeypatch.setitem(BACKENDS, "varlen", leaks)
    assert problem("varlen", SHAPES[0], CPU, torch.float32).startswith("values differ by ")
    with pytest.raises(ConfigError, match="run.packing_backend: varlen does not work here: values differ"):
        choose("varlen", SHAPES[0], CPU, torch.float32)


def test_wrong_gradients_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(query: Any, key: Any, value: Any, options: Options) -> torch.Tensor:
        return per_sample(query, key, value.detach() + 0 * value, options)

    monkeypatch.setitem(BACKENDS, "mask", detached)
    assert problem("mask", SHAPES[0], CPU, torch.float32).startswith("gradients of value differ by ")


def test_a_back_end_that_is_not_there_is_told_by_its_own_words() -> None:
    with pytest.raises(ConfigError, match="run.packing_backend: flex does not work here: NotImplementedError: "):
        choose("flex", SHAPES[0], CPU, torch.float32)


def test_auto_takes_samples_by_themselves_on_a_cpu() -> None:
    assert choose("auto", SHAPES[0], CPU, torch.float32)[0] == "per_sample"


def test_auto_falls_back_where_varlen_does_not_prove_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "problem", lambda *_: "no kernel for this GPU")
    found = choose("auto", SHAPES[0], torch.device("cuda"), torch.bfloat16)
    assert found == ("per_sample", "no varlen: no kernel for this GPU")


def test_rows_say_how_they_are_attended() -> None:
    model = build_model(load_case("c_minigptv2_lora_instruction"))
    assert describe_rows(RunConfig(), "packed", model).startswith("packed rows, attention per_sample (")
    assert describe_rows(RunConfig(packing_backend="mask"), "packed", model).startswith("packed rows, attention mask (")
    with pytest.raises(ConfigError, match="mask is for rows packed by sample; this run's are padded"):
        describe_rows(RunConfig(packing_backend="mask"), "padded", model)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["mask"])  # the ones that have a backward pass on a CPU, beside per_sample itself
def test_a_model_trains_the_same_with_every_back_end(name: str, recompute: bool) -> None:
    case = load_case("c_minigptv2_lora_instruction")
    results = []
    for backend in ("per_sample", name):
        model = build_model(case, use_grad_checkpoint_llm=recompute)
        model.packing_backend = backend
        batch = packed(encode(model, case), images_of(case))
        assert len(batch.lengths) > batch.input_ids.shape[0] == 1
        loss = model(batch).loss_sum
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.trainable_parameters_by_name()}))
    (loss, gradients), (other_loss, other_gradients) = results
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=0)
    assert any("lora_B" in name for name in gradients)
    for parameter, gradient in gradients.items():
        assert (other_gradients[parameter] - gradient).norm() <= 1e-4 * gradient.norm(), parameter


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_long_sample_in_parts_equals_one_call(kv_heads: int) -> None:
    lengths = (300, 3, 129)
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, heads, sum(lengths), 8) for heads in (2, kv_heads, kv_heads)]
    inputs = [torch.randn(size, generator=generator, requires_grad=True) for size in sizes]
    weight = torch.randn(sizes[0], generator=generator)
    options = Options(lengths, 0.0, None)
    results = []
    for backend in (per_sample, BACKENDS["mask"]):
        attended = backend(*inputs, options)
        results.append([attended, *torch.autograd.grad((attended * weight).sum(), inputs)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
