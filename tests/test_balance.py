"""Groups of a data set are drawn as often as the temperature says, in an order that any window can be asked for."""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.schema import BalanceConfig, DatasetConfig, RunConfig
from minigpt4.datasets import annotations, map_dataset
from minigpt4.datasets.balance import BalancedOrder, Groups, PlainOrder, group_records
from minigpt4.datasets.sampler import WindowSampler
from minigpt4.runners.overview import balance_text
from minigpt4.runners.parts import ratios_of
from tests.data_parts import builder, faces, json_file

SIZES = {"happy": 60, "sad": 30, "angry": 9, "rare": 1}
LABELS = [name for name, size in SIZES.items() for _ in range(size)]


def groups(temperature: float, labels: list[str] = LABELS) -> Groups:
    return group_records(labels, temperature)


def quotas(temperature: float) -> dict[str, int]:
    chosen = groups(temperature)
    return dict(zip(chosen.names, chosen.quotas().tolist(), strict=True))


def sampler(chosen: Groups, world_size: int = 1, rank: int = 0, accumulation: int = 4) -> WindowSampler:
    sizes, batch_sizes = (len(chosen.of_record), 37), (6, 2)
    return WindowSampler(sizes, (3, 1), batch_sizes, accumulation, world_size, rank, 42, [chosen, None])


def test_the_temperature_decides_how_often_a_group_is_drawn() -> None:
    assert quotas(0) == {"happy": 25, "sad": 25, "angry": 25, "rare": 25}
    assert quotas(1) == SIZES
    weights = {name: size**0.5 for name, size in SIZES.items()}
    for name, quota in quotas(0.5).items():
        assert quota == pytest.approx(100 * weights[name] / sum(weights.values()), abs=1)


@pytest.mark.parametrize("temperature", [0, 0.03, 0.5, 0.9, 1])
def test_every_pass_is_whole_and_leaves_no_group_out(temperature: float) -> None:
    for labels in (LABELS, ["one"] * 7, list("abc"), [str(n % 13 + n % 5) for n in range(997)]):
        found = groups(temperature, labels).quotas()
        assert found.sum() == len(labels) and found.min() >= 1


@pytest.mark.parametrize("temperature", [0, 0.5, 1])
def test_a_pass_holds_each_group_as_often_as_is_due_to_it(temperature: float) -> None:
    order = BalancedOrder(groups(temperature), 3, 0)
    for pass_index in range(3):
        drawn = [order.drawn(pass_index * 100 + place)[1] for place in range(100)]
        assert dict(Counter(LABELS[index] for index in drawn)) == quotas(temperature)


def test_no_record_of_a_group_comes_twice_before_all_have_come() -> None:
    chosen = groups(0)
    order = BalancedOrder(chosen, 3, 0)
    seen: dict[tuple[str, int], list[int]] = {}
    for number in range(100 * 12):  # twelve passes of 25 draws per group: five of the 60, ten of the 30
        group_pass, index = order.drawn(number)
        seen.setdefault((LABELS[index], group_pass), []).append(index)
    assert max(number for name, number in seen if name == "happy") == 4
    for (name, group_pass), indices in seen.items():
        members = {index for index, label in enumerate(LABELS) if label == name}
        is_last = (name, group_pass + 1) not in seen
        assert len(indices) == len(set(indices)) and (is_last or set(indices) == members)
    assert seen["happy", 0] != seen["happy", 1]


def test_temperature_one_goes_through_the_set_as_it_is() -> None:
    order = BalancedOrder(groups(1), 3, 0)
    for pass_index in range(3):
        drawn = [order.drawn(pass_index * 100 + place) for place in range(100)]
        assert {number for number, _ in drawn} == {pass_index}
        assert sorted(index for _, index in drawn) == list(range(100))


def test_groups_are_mixed_within_a_pass() -> None:
    order = BalancedOrder(groups(0), 3, 0)
    for begin in range(0, 100, 20):
        names = Counter(LABELS[order.drawn(begin + place)[1]] for place in range(20))
        assert len(names) == 4 and max(names.values()) < 12


def test_a_balanced_window_is_the_same_whatever_was_asked_before() -> None:
    walked = sampler(groups(0.3))
    windows = [walked.window(index) for index in range(30)]
    fresh = pickle.loads(pickle.dumps(sampler(groups(0.3))))
    assert [fresh.window(index) for index in (29, 3, 0)] == [windows[index] for index in (29, 3, 0)]
    assert sampler(groups(0.4)).window(5) != windows[5]


def test_the_order_of_balanced_windows_is_pinned_so_that_old_runs_resume() -> None:
    drawn = [[(key.dataset, key.pass_index, key.index) for key in keys] for keys in sampler(groups(0.5)).window(3)]
    assert drawn == [
        [(0, 0, 58), (0, 0, 98), (0, 1, 99), (0, 0, 38), (0, 0, 41), (0, 3, 99)],
        [(0, 0, 48), (0, 0, 27), (0, 0, 5), (0, 0, 93), (0, 0, 12), (0, 0, 7)],
        [(0, 0, 42), (0, 0, 8), (0, 0, 37), (0, 0, 53), (0, 0, 47), (0, 0, 32)],
        [(0, 0, 67), (0, 0, 70), (0, 0, 13), (0, 0, 69), (0, 1, 91), (0, 0, 84)],
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_balanced_window(world_size: int) -> None:
    alone = sampler(groups(0), accumulation=4 * world_size).window(7)
    shares = [sampler(groups(0), world_size, rank).window(7) for rank in range(world_size)]
    assert [shares[place % world_size][place // world_size] for place in range(4 * world_size)] == alone


def test_other_sets_are_drawn_as_if_nothing_were_balanced() -> None:
    plain = WindowSampler((100, 37), (3, 1), (6, 2), 4, 1, 0, 42)
    for index in range(20):
        pairs = zip(plain.window(index), sampler(groups(0)).window(index), strict=True)
        assert all((a == b) if a[0].dataset == 1 else b[0].dataset == 0 for a, b in pairs)


def test_the_order_of_a_file_does_not_name_the_groups() -> None:
    assert groups(0).names == groups(0, LABELS[::-1]).names == ("angry", "happy", "rare", "sad")


@pytest.mark.parametrize("is_balanced", [False, True])
def test_a_late_window_over_fifteen_million_records_comes_in_a_second(is_balanced: bool) -> None:
    size = 15_000_000
    of_record = (np.arange(size, dtype=np.uint32) % 97 % 8).astype(np.uint8)
    chosen = Groups(tuple("abcdefgh"), of_record, 0.3) if is_balanced else None
    begin = time.process_time()
    late = WindowSampler([size], [1.0], [6], 8, 8, 5, 42, [chosen])
    built = time.process_time()
    assert len(late.window(400_000)) == 8
    done = time.process_time()
    print(f"balanced {is_balanced}: built {built - begin:.2f} s, window 400,000 {done - built:.2f} s")
    assert done - begin < 3  # under one second on an idle core


def test_a_plain_order_is_a_permutation_per_pass() -> None:
    order = PlainOrder(7, 1, 0)
    assert sorted(order.drawn(number) for number in range(14)) == [(p, i) for p in range(2) for i in range(7)]


@pytest.fixture
def block(tmp_path: Path) -> dict[str, Any]:
    """Nine faces in three moods of one, three and five records."""
    moods = ["angry", *["sad"] * 3, *["happy"] * 5]
    names = faces(tmp_path, len(moods))
    records = [{"picture": name, "mood": mood} for name, mood in zip(names, moods, strict=True)]
    return {
        "format": "classification",
        "build_info": {"ann_path": json_file(tmp_path / "a.json", records), "image_path": str(tmp_path)},
        "fields": {"image": "picture", "label": "mood"},
        "prompts": ["Mood?"],
    }


@pytest.mark.parametrize("by", ["mood", "label"])
def test_a_data_set_is_balanced_by_any_field_of_its_records(block: dict[str, Any], by: str) -> None:
    made = builder("mine", block | {"balance": {"by": by}})
    assert made.check() == []
    chosen = made.build("train").groups()
    assert chosen is not None and chosen.names == ("angry", "happy", "sad")
    assert chosen.sizes.tolist() == [1, 5, 3] and chosen.quotas().tolist() == [3, 3, 3]
    assert builder("mine", block).build("train").groups() is None


def test_a_data_set_is_balanced_by_section(tmp_path: Path) -> None:
    content = {name: [{"question": "q", "answer": "a"}] * count for name, count in (("A", 3), ("B ", 1))}
    info = {"ann_path": json_file(tmp_path / "a.json", content), "sections": ["A", "B"]}
    made = builder("mine", {"data_type": "text", "build_info": info, "balance": {"by": "section", "temperature": 1}})
    assert made.check() == []
    chosen = made.build("train").groups()
    assert chosen is not None and dict(zip(chosen.names, chosen.sizes.tolist(), strict=True)) == {"A": 3, "B": 1}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("moods", r"a.json, record 0: balance.by: no field 'moods' \(did you mean 'mood'\?\); fields: picture, mood"),
        ("section", "a.json, record 0: balance.by: no field 'section'"),
        ("picture", "balance.by 'picture': every record is a group of its own"),
    ],
)
def test_a_balance_that_cannot_be_is_told_before_weights_load(block: dict[str, Any], by: str, message: str) -> None:
    (problem,) = builder("mine", block | {"balance": {"by": by}}).check()
    with pytest.raises(DataError, match=message):
        raise DataError(problem)


def test_a_temperature_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="balance.temperature must be in 0..1, got 1.5"):
        BalanceConfig(by="label", temperature=1.5)
    with pytest.raises(ConfigError, match="mix_temperature must be in 0..1, got -1"):
        RunConfig(mix_temperature=-1)


def test_the_header_says_how_often_each_group_is_passed_through() -> None:
    assert balance_text("mood", groups(0), 2.0).startswith(
        "by mood, temperature 0: rare 25.0 % (1 records, 50.00 passes), angry 25.0 % (9 records, 5.56 passes), "
    )
    many = balance_text("id", groups(0, [str(number // 2) for number in range(40)]), 1.0)
    assert many.count("records") == 8 and "... 12 more ..." in many


def test_data_sets_are_mixed_by_their_sizes_where_no_ratio_is_given() -> None:
    class Sized:
        def __init__(self, size: int, batch_size: int, ratio: float | None = None) -> None:
            self.size, self.cfg = size, DatasetConfig(batch_size=batch_size, sample_ratio=ratio)

        def __len__(self) -> int:
            return self.size

    sets: Any = [Sized(100, 2), Sized(400, 4)]
    assert ratios_of(sets, None) == [1, 1]
    assert ratios_of(sets, 1.0) == [50, 100]  # micro-batches; in samples 100 : 400
    assert ratios_of(sets, 0.5) == [5, 5]  # in samples 10 : 20
    assert ratios_of([Sized(9, 1, 2.0), Sized(5, 1, 3.0)], None) == [2, 3]  # type: ignore[list-item]


def test_groups_are_kept_and_belong_to_one_content_and_one_choice_of_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"question": "who?", "answer": "me", "mood": f"m{n % 3}", "age": n % 5} for n in range(40)]
    path = tmp_path / "a.jsonl"
    monkeypatch.setattr(annotations, "INDEXED_FROM", 0)

    def grouped(by: str, temperature: float = 0.0, **more: Any) -> tuple[tuple[str, ...], list[int], list[int]]:
        block = {"format": "text", "build_info": {"ann_path": str(path)}, **more}
        made = builder("mine", {**block, "balance": {"by": by, "temperature": temperature}}).build("train").groups()
        return made.names, made.of_record.tolist(), made.quotas().tolist()

    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    some = {"val": {"fraction": 0.3, "group_by": "age"}}
    before = [grouped("mood"), grouped("age"), grouped("mood", **some)]
    assert before[0][1] == [n % 3 for n in range(40)] and len(before[2][1]) < 40
    with monkeypatch.context() as patch:
        patch.setattr(map_dataset.AnnotationDataset, "_group_of", lambda *given: pytest.fail("grouped again"))
        assert [grouped("mood"), grouped("age"), grouped("mood", **some)] == before
        assert grouped("mood", 1.0)[2] == [14, 13, 13]  # the temperature is no part of what is kept
    path.write_text("".join(f"{json.dumps(record)}\n" for record in reversed(records)) + "\n")
    assert grouped("mood")[1] == [n % 3 for n in reversed(range(40))]
