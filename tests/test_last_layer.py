"""The last layer at wanted positions alone: the same numbers, less work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from minigpt4.models.generation import GenerationMixin
from minigpt4.models.last_layer import is_llama_layer, narrow_last_layer
from minigpt4.models.probe import examine
from tests.plan_parts import language_model as language_model
from tests.test_probe import tiny_lm
from tests.test_recompute import model_with, results

TARGETS = ["q_proj", "o_proj", "down_proj"]


def last_mlp_rows(model: GenerationMixin, packed: bool) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients; how many positions the last MLP sees."""
    seen: list[int] = []
    last = model.llama_model.get_base_model().get_decoder().layers[-1]
    handle = last.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1].numel()))
    found = results(model, packed)[0]
    handle.remove()
    return found, seen[0]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("policy", ["none", "mlp", "full"])
def test_losses_and_gradients_are_those_of_the_whole_layer(policy: str, packed: bool, language_model: Path) -> None:
    torch.manual_seed(7)
    model = model_with(policy, language_model, lora_target_modules=TARGETS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # fewer positions would draw other numbers
    assert model.ends_narrow
    narrow, few = last_mlp_rows(model, packed)
    model.ends_narrow = False
    model.zero_grad(set_to_none=True)
    whole, many = last_mlp_rows(model, packed)
    assert 0 < few < 0.5 * many
    assert narrow.keys() == whole.keys() and len(whole) > 3
    for name, value in whole.items():
        torch.testing.assert_close(narrow[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_decoder_of_another_kind_computes_every_position() -> None:
    llm = tiny_lm("stablelm", num_key_value_heads=4)
    assert not narrow_last_layer(llm) and not examine(llm, "llm").ends_narrow


@pytest.mark.parametrize("wrong", ["another position", "no keyword"])
def test_what_does_not_prove_itself_is_not_used(wrong: str, language_model: Path) -> None:
    model = model_with("none", language_model)
    llm = model.llama_model.get_base_model()
    last = type(llm.get_decoder().layers[-1])
    right = last.forward
    assert is_llama_layer(llm.get_decoder().layers[-1]) and examine(llm, "llm").ends_narrow

    def forward(self: torch.nn.Module, x: Tensor, wanted: Tensor | None = None, **kwargs: object) -> Tensor:
        if wanted is not None and wrong == "no keyword":
            raise TypeError("unexpected keyword argument 'wanted'")
        result: Tensor = right(self, x, wanted=None if wanted is None else wanted - 1, **kwargs)
        return result

    with mock.patch.object(last, "forward", forward):
        assert not examine(llm, "llm").ends_narrow


def test_two_threads_in_one_model_want_different_positions(language_model: Path) -> None:
    model = model_with("none", language_model).eval()
    embeddings = torch.randn(2, 1, 30, model.hidden_size, generator=torch.Generator().manual_seed(0))
    wanted = [torch.arange(0, 30, 2), torch.arange(25, 30)]
    with torch.no_grad():
        expected = [model.hidden_states(one, torch.arange(30)[None], (30,)) for one in embeddings]

    def differences(number: int) -> float:
        largest = 0.0
        for _ in range(40):
            with torch.no_grad():
                found = model.hidden_states(embeddings[number], torch.arange(30)[None], (30,), wanted[number])
            largest = max(largest, float((found - expected[number][0, wanted[number]]).abs().max()))
        return largest

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(differences, range(2))) < 1e-4


def test_a_layer_whose_adapters_were_merged_still_ends_narrow(language_model: Path) -> None:
    model = model_with("none", language_model, lora_target_modules=TARGETS).eval()
    embeddings, wanted = torch.randn(1, 9, model.hidden_size), torch.tensor([3, 8])
    with torch.no_grad():
        before = model.hidden_states(embeddings, torch.arange(9)[None], (9,), wanted)
        model.merge_lora()
        after = model.hidden_states(embeddings, torch.arange(9)[None], (9,), wanted)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
