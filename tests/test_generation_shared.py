"""What several prompts of one batch have in common is computed once, and the answers stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minigpt4.common.types import Encoded
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from tests.golden_cases import build_model, load_case

SHORT = GenerateOptions(max_new_tokens=12)
QUESTIONS = ("who?", "is the mouth of the person open or closed?", "why is he so sad?", "who?")


@pytest.fixture(scope="module")
def model() -> GenerationMixin:
    built = build_model(load_case("c_minigptv2_lora_instruction"))
    assert isinstance(built, GenerationMixin)
    return built


@pytest.fixture
def seen(model: GenerationMixin) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Shapes that go into the projection and into the decoder."""
    shapes: dict[str, list[tuple[int, ...]]] = {"projection": [], "decoder": []}

    def note_features(module: nn.Module, arguments: Any) -> None:
        shapes["projection"].append(tuple(arguments[0].shape))

    def note_embeddings(module: nn.Module, arguments: Any, options: Any) -> None:
        if options.get("inputs_embeds") is not None:
            shapes["decoder"].append(tuple(options["inputs_embeds"].shape[:2]))

    hooks = [
        model.llama_proj.register_forward_pre_hook(note_features),  # type: ignore[operator, union-attr]
        model._lm.get_decoder().register_forward_pre_hook(note_embeddings, with_kwargs=True),
    ]
    yield shapes
    for hook in hooks:
        hook.remove()


def asked(model: GenerationMixin, questions: tuple[str, ...] = QUESTIONS) -> list[Encoded]:
    return [model.encoder.encode_prompt([], f"<Img><ImageHere></Img> {question} ") for question in questions]


def pictures(*which: int) -> Tensor:
    both = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    return both[list(which)]


@pytest.mark.parametrize("prepare", ["pixels", "features"])
def test_questions_about_one_picture_share_its_positions(
    model: GenerationMixin, seen: dict[str, list[tuple[int, ...]]], prepare: str
) -> None:
    prompts, images = asked(model), pictures(0, 0, 0, 0)
    if prepare == "features":
        with torch.no_grad():
            images = model.vision_features(images)
    singly = [model.generate([prompt], images[:1], SHORT)[0] for prompt in prompts]
    assert len(set(singly)) == 3
    for shapes in seen.values():
        shapes.clear()
    assert model.generate(prompts, images, SHORT) == singly
    assert [shape[0] for shape in seen["projection"]] == [1]
    (one, shared), (rows, rest) = seen["decoder"][:2]
    assert (one, rows, shared + rest) == (1, 4, max(len(prompt.ids) for prompt in prompts))
    assert shared > model.encoder.num_image_tokens


def test_a_picture_that_some_prompts_share_is_encoded_once(
    model: GenerationMixin, seen: dict[str, list[tuple[int, ...]]]
) -> None:
    prompts, images = asked(model), pictures(0, 1, 0, 1)
    singly = [model.generate([prompt], image[None], SHORT)[0] for prompt, image in zip(prompts, images, strict=True)]
    for shapes in seen.values():
        shapes.clear()
    assert model.generate(prompts, images, SHORT) == singly
    assert [shape[0] for shape in seen["projection"]] == [2]
    assert seen["decoder"][0][0] == 4  # the prompts differ from their pictures on


def test_equal_prompts_leave_one_position_to_compute(
    model: GenerationMixin, seen: dict[str, list[tuple[int, ...]]]
) -> None:
    prompts, images = asked(model, ("who?", "who?")), pictures(0, 0)
    assert len(set(model.generate(prompts, images, SHORT))) == 1
    assert seen["decoder"][1] == (2, 1)


def test_beams_and_a_narrow_window_compute_every_row(
    model: GenerationMixin, seen: dict[str, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, images = asked(model), pictures(0, 0, 0, 0)
    model.generate(prompts, images, replace(SHORT, num_beams=2))
    assert seen["decoder"][0][0] == 8
    seen["decoder"].clear()
    monkeypatch.setattr(model._lm.config, "sliding_window", 40, raising=False)
    assert model._shared_start(prompts, images, SHORT) == 0
