"""run.cache_images: what a picture decodes to is kept, whoever decoded it."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import Config
from minigpt4.common.types import Pixels, as_floats
from minigpt4.datasets import map_dataset, picture_cache
from minigpt4.datasets.feature_cache import FeatureStore, read_spaces
from minigpt4.datasets.map_dataset import MapDataset
from minigpt4.processors.image import Blip2ImageTrain
from minigpt4.runners.picture_cache import use_picture_cache
from tests.data_parts import builder, faces, json_file
from tests.engine_parts import tiny_config


class Dimmed(Blip2ImageTrain):
    """A user's own last step."""

    def __call__(self, image: Image.Image) -> Tensor:
        return super().__call__(image) / 2


def dataset_in(folder: Path, count: int = 4) -> MapDataset:
    """Records with one picture each."""
    folder.mkdir(exist_ok=True)
    records = [{"image": name, "question": "who?", "answer": "me"} for name in faces(folder, count)]
    info = {"ann_path": json_file(folder / "a.json", records), "image_path": str(folder)}
    made = builder("own", {"format": "vqa", "build_info": info}).build("train")
    assert isinstance(made, MapDataset)
    return made


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    made = tiny_config(tmp_path)
    return replace(made, run=replace(made.run, cache_images=True, cache_root=str(tmp_path / "cache")))


def stores(cfg: Config) -> list[FeatureStore]:
    root = Path(cfg.run.cache_root)
    return [FeatureStore(root, space) for space in read_spaces(root)]


def read_all(dataset: MapDataset) -> list[Tensor]:
    return [as_floats(dataset.sample(0, index, 1).images[0]) for index in range(len(dataset))]


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = map_dataset.open_image

    def headers_only(source: object, name: str = "", decode: bool = True) -> Image.Image:
        assert not decode, source
        return opened(source, name, decode)

    monkeypatch.setattr(map_dataset, "open_image", headers_only)


def test_a_second_run_decodes_nothing_and_sees_the_same_pixels(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first, second = (dataset_in(tmp_path / "data") for _ in range(3))
    use_picture_cache(cfg, [first])
    assert first.picture_cache is not None
    found = read_all(first)
    first.picture_cache.close()
    expected = read_all(plain)
    no_decoding(monkeypatch)
    use_picture_cache(cfg, [second])
    for other in (found, read_all(second)):
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))
    (store,) = stores(cfg)
    assert len(store) == 4 and store.space.dtype == "uint8" and list(store.damaged()) == []


def _worker(dataset: MapDataset, numbers: list[int]) -> None:
    for number in numbers:
        dataset.sample(0, number, 1)


def test_forked_workers_write_files_of_their_own_and_end_with_everything_on_disk(cfg: Config, tmp_path: Path) -> None:
    dataset = dataset_in(tmp_path / "data", 6)
    use_picture_cache(cfg, [dataset])
    dataset.sample(0, 0, 1)  # the parent is writing when its workers are forked
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_worker, args=(dataset, numbers)) for numbers in ([1, 2], [3, 4])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    dataset.sample(0, 5, 1)
    assert dataset.picture_cache is not None
    dataset.picture_cache.close()
    (store,) = stores(cfg)
    assert len(store) == 6 and len(list(store.folder.glob("*.rows"))) == 3 and list(store.damaged()) == []
    for number in range(6):
        source = dataset.sources(number)[0]
        decoded = dataset.recipe.vision.prepare(dataset.open(source))
        assert isinstance(decoded, Pixels)
        assert torch.equal(store.rows()(store.place(picture_cache.source_key(source))), decoded.values)


def test_a_file_that_changed_is_decoded_again(cfg: Config, tmp_path: Path) -> None:
    dataset = dataset_in(tmp_path / "data")
    use_picture_cache(cfg, [dataset])
    before = read_all(dataset)[0]
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "data" / "0.png")
    assert not torch.equal(read_all(dataset)[0], before)


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(picture_cache, "LEAST_FREE", 1 << 60)
    dataset = dataset_in(tmp_path / "data")
    use_picture_cache(cfg, [dataset])
    with caplog.at_level(logging.WARNING):
        assert len(read_all(dataset)) == 4
    assert caplog.text.count("nothing more is kept") == 1 and stores(cfg) == []


def test_data_sets_that_prepare_pictures_alike_share_a_cache(cfg: Config, tmp_path: Path) -> None:
    one, other = dataset_in(tmp_path / "a"), dataset_in(tmp_path / "b")
    use_picture_cache(cfg, [one, other])
    assert one.picture_cache is other.picture_cache is not None


def test_a_processor_of_ones_own_that_overrides_the_call_is_what_training_sees_and_cannot_be_kept(
    cfg: Config, tmp_path: Path
) -> None:
    dataset = dataset_in(tmp_path / "data")
    expected = read_all(dataset)[1] / 2
    vision = dataset.recipe.vision
    dataset.recipe = replace(dataset.recipe, vision=Dimmed(vision.cfg, vision.spec))
    assert torch.equal(read_all(dataset)[1], expected)
    with pytest.raises(ConfigError, match=r"run.cache_images: vis_processor of data set 'own' gives no bytes: Dimmed"):
        use_picture_cache(cfg, [dataset])


def test_chance_in_a_processor_is_refused(cfg: Config, tmp_path: Path) -> None:
    class Noisy(Blip2ImageTrain):
        def prepare(self, image: Image.Image) -> Tensor | Pixels:
            made = super().prepare(image)
            assert isinstance(made, Pixels)
            return replace(made, values=made.values ^ int(self.chance.random() < 0.5))

        chance = Random(0)

    dataset = dataset_in(tmp_path / "data")
    vision = dataset.recipe.vision
    dataset.recipe = replace(dataset.recipe, vision=Noisy(vision.cfg, vision.spec))
    with pytest.raises(ConfigError, match="is random: Noisy"):
        use_picture_cache(cfg, [dataset])
