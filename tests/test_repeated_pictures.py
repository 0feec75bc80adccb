"""A picture that a batch shows several times is encoded once, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minigpt4.common.pictures import distinct
from minigpt4.common.types import Batch, Sample, Turn
from minigpt4.datasets.collate import collate_packed, collate_padded
from minigpt4.models.base_model import BaseModel
from tests.golden_cases import build_model, images_of, load_case

NAMES = ["c_minigptv2_lora_instruction", "a_minigpt4_qformer_vicuna"]


def repeated(model: BaseModel, name: str, rows: int) -> list[Batch]:
    """Four samples of two pictures, packed or padded."""
    case = load_case(name)
    images = images_of(case)
    turns = [*case.turns(), *case.turns()][:4]
    samples = [
        Sample((Turn(one[0].prompt, one[0].answer),), (images[i % 2].clone(),), str(i)) for i, one in enumerate(turns)
    ]
    return collate_packed(samples, model.encoder, 4096) if rows == 1 else [collate_padded(samples, model.encoder)]


def written_out(batch: Batch) -> Batch:
    assert batch.image_order is not None
    return replace(batch, images=batch.images[batch.image_order], image_order=None)


def gradients(model: BaseModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(batch).loss_sum
    loss.backward()
    named = model.trainable_parameters_by_name()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 4])
def test_loss_and_gradients_equal_those_of_a_batch_written_out(name: str, rows: int) -> None:
    model = build_model(load_case(name), lora_dropout=0.0)
    (batch,) = repeated(model, name, rows)
    assert len(batch.images) == 2 and batch.image_order is not None and batch.image_order.tolist() == [0, 1, 0, 1]
    loss, found = gradients(model, batch)
    expected_loss, expected = gradients(model, written_out(batch))
    assert loss == pytest.approx(expected_loss, abs=1e-4)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("changes", "encoded"), [({}, 2), ({"freeze_vit": False}, 4)])
def test_frozen_parts_see_a_picture_once_and_parts_that_train_at_every_place(
    changes: dict[str, bool], encoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(load_case(NAMES[0]))
    if changes:
        model.cfg = replace(model.cfg, **changes)
    seen: list[int] = []
    original = model.vision_features

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return original(images)

    monkeypatch.setattr(model, "vision_features", counted)
    model(repeated(model, NAMES[0], 1)[0])
    assert seen == [encoded]


def test_pictures_are_equal_only_in_every_value() -> None:
    one = torch.zeros(3, 40, 40)
    other = one.clone()
    other[1, 7, 3] = 1.0  # between the values that are looked at first
    kept, order = distinct([one, other, one.clone(), other.clone()])
    assert order == [0, 1, 0, 1] and torch.equal(kept[1], other) and len(kept) == 2


def test_a_batch_without_repetition_is_as_before() -> None:
    model = build_model(load_case(NAMES[0]))
    (batch,) = repeated(model, NAMES[0], 1)
    two = [Sample((Turn("<Img><ImageHere></Img> who?", "me"),), (image,), "x") for image in batch.images]
    assert collate_padded(two, model.encoder).image_order is None
