"""Samples become rows: nothing is lost, nothing is mixed, nothing is supervised that should not be."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minigpt4.common.errors import DataError
from minigpt4.common.schema import DatasetConfig
from minigpt4.common.types import (
    IGNORE_INDEX,
    IMAGE_PROMPT,
    IMAGE_TOKEN,
    Batch,
    Pixels,
    Sample,
    Turn,
    as_floats,
)
from minigpt4.conversation.encoding import Encoder
from minigpt4.datasets.collate import WindowDataset, collate_packed, collate_padded
from minigpt4.datasets.sampler import WindowSampler


class Letters:
    """One id per character; ids are never 0, which pads."""

    bos_id: int | None = 1
    eos_id = 2
    pad_id = 0
    vocab_size = 300

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(number - 3) for number in ids if number > 2)


ENCODER = Encoder(Letters(), num_image_tokens=4, max_txt_len=50, max_context_len=60)


def sample(number: int, answer: str = "yes", images: int = 1) -> Sample:
    prompt = " ".join([IMAGE_PROMPT] * images + ["who?"])
    pictures = tuple(torch.full((3, 2, 2), float(10 * number + place)) for place in range(images))
    return Sample((Turn(prompt, answer),), pictures, f"set/{number}")


SAMPLES = [sample(0), sample(1, "a longer answer", 0), sample(2, "no", 2), sample(3, "ok", 0)]


def in_bytes(value: int, mean: float = 0.5) -> Pixels:
    return Pixels(torch.full((3, 2, 2), value, dtype=torch.uint8), (mean, 0.4, 0.3), (0.2, 0.25, 0.5))


def with_pictures(*pictures: Tensor | Pixels) -> list[Sample]:
    return [replace(sample(number), images=(picture,)) for number, picture in enumerate(pictures)]


def test_bytes_travel_as_bytes_and_are_normalised_on_the_device_to_the_bit() -> None:
    batch = collate_padded(with_pictures(in_bytes(7), in_bytes(200), in_bytes(7)), ENCODER)
    assert batch.images.dtype == torch.uint8 and len(batch.images) == 2 and batch.image_order is not None
    ready = batch.to(torch.device("cpu"))
    assert torch.equal(ready.images, torch.stack([in_bytes(7).normalised(), in_bytes(200).normalised()]))
    assert ready.image_norm is None and ready.to(torch.device("cpu")).images is ready.images


def test_pictures_that_want_different_normalisations_or_are_floats_become_floats_first() -> None:
    pictures = [in_bytes(7), in_bytes(7, mean=0.1), torch.ones(3, 2, 2)]
    batch = collate_padded(with_pictures(*pictures), ENCODER)
    assert batch.image_norm is None and torch.equal(batch.images, torch.stack([as_floats(one) for one in pictures]))


def alone(one: Sample) -> Batch:
    return collate_padded([one], ENCODER)


def test_padded_rows_hold_one_sample_each() -> None:
    batch = collate_padded(SAMPLES, ENCODER)
    assert batch.input_ids.shape == (4, max(batch.lengths)) and batch.input_ids.dtype == torch.long
    assert batch.sample_ids == ("set/0", "set/1", "set/2", "set/3")
    for row, one in enumerate(SAMPLES):
        expected, length = alone(one), batch.lengths[row]
        assert torch.equal(batch.input_ids[row, :length], expected.input_ids[0])
        assert torch.equal(batch.labels[row, :length], expected.labels[0])
        assert torch.equal(batch.position_ids[row, :length], torch.arange(length))
        assert (batch.input_ids[row, length:] == 0).all() and (batch.position_ids[row, length:] == 0).all()
        assert (batch.labels[row, length:] == IGNORE_INDEX).all()


def test_only_answers_with_their_end_are_supervised() -> None:
    batch = collate_padded(SAMPLES, ENCODER)
    trained = [ENCODER.tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for row in batch.labels]
    assert trained == ["yes\n", "a longer answer\n", "no\n", "ok\n"]
    assert batch.num_target_tokens == sum(map(len, trained))


def test_images_follow_the_order_of_their_positions() -> None:
    batch = collate_padded(SAMPLES, ENCODER)
    assert batch.images.shape == (3, 3, 2, 2)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 20, 21]
    assert batch.num_image_positions == int((batch.input_ids == IMAGE_TOKEN).sum()) == 12


def test_a_batch_without_images_has_none() -> None:
    batch = collate_padded([SAMPLES[1]], ENCODER)
    assert len(batch.images) == 0 and batch.images.ndim == 4


def test_packed_rows_hold_whole_samples_without_padding() -> None:
    rows = collate_packed(SAMPLES, ENCODER, row_tokens=50)
    assert [row.sample_ids for row in rows] == [("set/0", "set/1"), ("set/2", "set/3")]
    for row in rows:
        assert row.input_ids.shape == (1, sum(row.lengths)) and row.input_ids.shape[1] <= 50
        start = 0
        for number, length in zip(row.sample_ids, row.lengths, strict=True):
            expected = alone(SAMPLES[int(number[-1])])
            part = slice(start, start + length)
            assert torch.equal(row.input_ids[0, part], expected.input_ids[0])
            assert torch.equal(row.labels[0, part], expected.labels[0])
            assert torch.equal(row.position_ids[0, part], torch.arange(length))
            assert row.labels[0, start] == IGNORE_INDEX
            start += length


def test_first_fit_fills_earlier_rows_and_a_long_sample_has_its_own() -> None:
    samples = [sample(0, "x" * 20), sample(1, "x" * 45, 2), sample(2, "x", 0)]
    lengths = [alone(one).lengths[0] for one in samples]
    rows = collate_packed(samples, ENCODER, row_tokens=lengths[0] + lengths[2])
    assert lengths[1] > lengths[0] + lengths[2]
    assert [row.sample_ids for row in rows] == [("set/0", "set/2"), ("set/1",)]


def test_packed_and_padded_hold_the_same_tokens_and_targets() -> None:
    padded, rows = collate_padded(SAMPLES, ENCODER), collate_packed(SAMPLES, ENCODER, 1000)
    assert len(rows) == 1 and rows[0].lengths == padded.lengths
    assert rows[0].num_target_tokens == padded.num_target_tokens
    assert torch.equal(rows[0].images, padded.images)


def test_the_first_token_of_a_sample_is_never_supervised() -> None:
    bare = Letters()
    bare.bos_id = None
    batch = collate_packed([Sample((Turn("", "ab"),), (), "x/0")] * 2, replace(ENCODER, tokenizer=bare), 100)[0]
    assert batch.labels[0].tolist() == [IGNORE_INDEX, 3 + ord("b"), 13] * 2
    assert batch.num_target_tokens == 4


def test_an_image_that_was_cut_off_is_left_out() -> None:
    short = replace(ENCODER, max_context_len=22)
    batch = collate_padded([sample(5, images=2)], short)
    assert len(batch.images) == 1 and batch.images[0, 0, 0, 0] == 50
    assert batch.num_image_positions == 4


def test_a_sample_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="sample 'set/5': max_context_len 3 leaves no room"):
        collate_padded([sample(5)], replace(ENCODER, max_context_len=3))
    with pytest.raises(DataError, match="sample 'set/5': 1 image tags, 0 images"):
        collate_padded([replace(sample(5), images=())], ENCODER)


class Numbers:
    """Sample n of a made-up set; its answer tells the arguments it was made from."""

    def __init__(self, name: str, size: int, batch_size: int) -> None:
        self.name, self.size = name, size
        self.cfg = DatasetConfig(name=name, batch_size=batch_size)

    def __len__(self) -> int:
        return self.size

    def sample(self, pass_index: int, index: int, seed: int) -> Sample:
        return Sample((Turn("?", f"{pass_index}/{index}/{seed}"),), (), f"{self.name}/{index}")

    def fingerprint(self) -> str:
        return self.name


def windows(packing: str, rank: int = 0, world_size: int = 1, accumulation: int = 2) -> WindowDataset:
    sets = [Numbers("a", 10, 2), Numbers("b", 5, 1)]
    drawn = WindowSampler([10, 5], [2, 1], [2, 1], accumulation, world_size, rank, 3)
    return WindowDataset(sets, drawn, ENCODER, packing, 60, 3)


def ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.sample_ids]


def test_a_padded_window_has_one_batch_per_micro_batch() -> None:
    window = windows("padded")[5]
    assert len(window) == 2
    for batch in window:
        assert len({name[0] for name in batch.sample_ids}) == 1
        assert len(batch.lengths) == {"a": 2, "b": 1}[batch.sample_ids[0][0]]


def test_a_packed_window_holds_the_samples_of_the_padded_one() -> None:
    for index in range(10):
        assert sorted(ids(windows("packed")[index])) == sorted(ids(windows("padded")[index]))


def test_two_ranks_share_the_window_of_one() -> None:
    both = [name for rank in (0, 1) for name in ids(windows("padded", rank, 2, 2)[4])]
    assert sorted(both) == sorted(ids(windows("padded", accumulation=4)[4]))


def test_workers_of_a_loader_yield_the_same_windows_in_order() -> None:
    dataset = windows("packed")
    assert ids(pickle.loads(pickle.dumps(dataset))[3]) == ids(dataset[3])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=[3, 4, 9], num_workers=2)
    assert [ids(window) for window in loader] == [ids(dataset[index]) for index in (3, 4, 9)]
