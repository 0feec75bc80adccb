"""Whole runs with ``model.cache_vision``: the same losses, a second run computes nothing, kills lose nothing."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4 import catalog
from minigpt4.cli import main
from minigpt4.common.config import load_config
from minigpt4.common.dist import single
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import CanaryConfig, Config
from minigpt4.common.types import as_floats
from minigpt4.datasets import feature_cache
from minigpt4.datasets.pictures import open_image
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import feature_shape, frozen_features, identity, release, why_not_frozen
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.processors.image import Blip2ImageTrain
from minigpt4.runners import feature_fill, vision_cache
from minigpt4.runners.dry_run import dry_run
from minigpt4.runners.parts import build_datasets, build_model
from minigpt4.runners.validation import Validator
from minigpt4.runners.vision_cache import canary_processor, size_text, use_cache
from minigpt4.tasks.answering import answer_samples
from minigpt4.tasks.image_text_pretrain import ImageTextPretrainTask
from tests.golden_cases import build_model as golden_model
from tests.golden_cases import encode, images_of, load_case, padded
from tests.resume_harness import Lab, Setup, assert_same_run, checks, newest, open_lab, rows


class Flipped(Blip2ImageTrain):
    """Mirrors a picture now and then."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = super().__call__(image)
        return pixels.flip(-1) if random.random() < 0.5 else pixels


class Streamed:
    """A data set of a plugin's own."""

    name = "stream"


CACHED = "model.cache_vision=disk"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("lab")) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a cache."""
    return trained(lab, tmp_path_factory.mktemp("plain"), Setup())[0]


@pytest.fixture(scope="module")
def cached(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a cache: its job and its cache."""
    folder = tmp_path_factory.mktemp("cached")
    job, text = trained(lab, folder, Setup(), CACHED)
    assert "17 pictures of 4.1 kB, 17 to compute = 69.6 kB" in text and "16 of them computed now" in text
    return job, folder / "vision_cache"


def trained(lab: Lab, folder: Path, setup: Setup, *options: str) -> tuple[Path, str]:
    attempt = lab.start(folder, setup, *options, resume=None)
    attempt.done()
    return newest(folder), attempt.text()


def assert_close(job: Path, expected: Path, tolerance: float = 2e-5) -> None:
    """The same windows; losses to 2e-5 in float32: the noise of the tower's other batches, grown over the run."""
    mine, theirs = [*rows(job), *checks(job)], [*rows(expected), *checks(expected)]
    assert len(mine) == len(theirs) > 8
    for one, other in zip(mine, theirs, strict=True):
        assert {key: value for key, value in one.items() if isinstance(value, int)} == {
            key: value for key, value in other.items() if isinstance(value, int)
        }
        for key in ("loss", "val_loss"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=tolerance)


def test_losses_equal_those_without_a_cache(cached: tuple[Path, Path], plain: Path) -> None:
    assert_close(cached[0], plain)


def test_a_second_run_computes_nothing_and_repeats_the_first_to_the_last_bit(
    lab: Lab, cached: tuple[Path, Path], tmp_path: Path
) -> None:
    job, text = trained(lab, tmp_path, Setup(workers=2), CACHED, f"run.cache_root={cached[1]}")
    assert "1 to compute" in text and "0 of them computed" in text  # the broken picture is tried again
    assert_same_run(job, cached[0])


@pytest.fixture(scope="module")
def filed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A run whose tower comes from a file and whose cache is full at its end: its job, the options of the next."""
    folder = tmp_path_factory.mktemp("filed")
    tower = folder / "tower.pth"
    torch.save(setting(lab)[1].visual_encoder.state_dict(), tower)
    options = (CACHED, f"model.vit_weights={tower}", f"run.cache_root={folder / 'cache'}")
    job, text = trained(lab, folder, Setup(), *options)
    assert "were not read" not in text and "16 of them computed now" in text
    return job, options


def test_a_full_cache_needs_no_tower(lab: Lab, filed: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    job, text = trained(lab, tmp_path, Setup(), *filed[1])
    assert "1 to compute" in text  # the broken picture, for which nobody reads a tower
    assert "the files of the vision part were not read" in text and "tower.pth" not in text
    assert_same_run(job, filed[0])


def test_two_ranks_train_without_a_tower(lab: Lab, filed: tuple[Path, tuple[str, ...]], tmp_path: Path) -> None:
    job, text = trained(lab, tmp_path, Setup(2), *filed[1])
    assert "the files of the vision part were not read" in text and len(rows(job)) == len(rows(filed[0]))


def test_features_that_are_gone_bring_the_tower_back(
    lab: Lab, filed: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(filed[0].parents[1] / "cache", root)
    (index,) = root.glob("*/*.index")
    index.write_bytes(index.read_bytes()[: 5 * 24])
    job, text = trained(lab, tmp_path, Setup(), *filed[1], f"run.cache_root={root}")
    assert "11 of them computed now" in text and "tower.pth" in text and "were not read" not in text
    assert_close(job, filed[0])
    (record,) = (root / "weights").glob("*.json")
    record.write_text("{")
    assert "the weights are read instead" in trained(lab, tmp_path, Setup(), *filed[1], f"run.cache_root={root}")[1]


def test_half_precision_is_kept_as_it_is_computed_in(lab: Lab, tmp_path: Path) -> None:
    half = ("run.precision=bf16", "model.lora_dropout=0")
    expected, _ = trained(lab, tmp_path / "plain", Setup(options=half))
    job, text = trained(lab, tmp_path / "cached", Setup(options=half), CACHED)
    assert "17 pictures of 2.05 kB" in text
    assert_close(job, expected, 5e-3)


def test_two_jobs_fill_one_cache_at_once(lab: Lab, cached: tuple[Path, Path], tmp_path: Path) -> None:
    root = f"run.cache_root={tmp_path / 'cache'}"
    attempts = [lab.start(tmp_path / name, Setup(workers=2), CACHED, root, resume=None) for name in "ab"]
    for attempt in attempts:
        attempt.done()
        assert_close(newest(attempt.folder), cached[0])
    assert main(["cache", "verify", "--root", str(tmp_path / "cache")]) == 0


def test_validation_alone_fills_the_cache_with_what_is_held_out(lab: Lab, tmp_path: Path) -> None:
    attempt = lab.start(tmp_path, Setup(), CACHED, "run.evaluate=True", resume=None)
    attempt.done()
    assert "vision cache: 5 pictures" in attempt.text() and "val_loss" in attempt.text()


@pytest.mark.parametrize("name", ["c_minigptv2_lora_instruction", "a_minigpt4_qformer_vicuna"])
def test_a_batch_of_features_has_the_loss_of_its_pixels(name: str) -> None:
    case = load_case(name)
    tiny = golden_model(case)
    batch = padded(encode(tiny, case), images_of(case))
    loss = float(tiny(batch).loss_sum.detach())
    batch.images = torch.cat([frozen_features(tiny, image[None]) for image in batch.images])
    assert batch.images.shape[1:] == feature_shape(tiny)
    assert why_not_frozen(tiny) == ""
    release(tiny)
    assert float(tiny(batch).loss_sum.detach()) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("mode", ["disk", pytest.param("memory", marks=pytest.mark.slow)])
def test_two_ranks_share_the_work_and_see_what_one_rank_sees(mode: str, lab: Lab, tmp_path: Path) -> None:
    steady = ("model.lora_dropout=0", "run.init_lr=1e-3", "run.min_lr=1e-3", "run.warmup_steps=0")
    expected, _ = trained(lab, tmp_path / "plain", Setup(2, options=steady))
    job, text = trained(lab, tmp_path / mode, Setup(2, workers=2, options=steady), f"model.cache_vision={mode}")
    assert_close(job, expected)
    assert "16 of them computed now" in text
    assert (tmp_path / mode / "vision_cache").exists() is (mode == "disk")
    if mode == "disk":
        assert len(list((tmp_path / mode / "vision_cache").glob("*/*.rows"))) == 2


def test_a_killed_run_resumes_bit_for_bit_with_its_cache(lab: Lab, cached: tuple[Path, Path], tmp_path: Path) -> None:
    for crash in ("row:3", ""):
        attempt = lab.start(tmp_path, Setup(), CACHED, crash=crash)
        attempt.crashed() if crash else attempt.done()
    assert_same_run(newest(tmp_path), cached[0])


def test_a_build_killed_half_way_goes_on(lab: Lab, cached: tuple[Path, Path], tmp_path: Path) -> None:
    """What a kill leaves: some rows in the index, more without, and half a row."""
    root = tmp_path / "cache"
    shutil.copytree(cached[1], root)
    (index,) = root.glob("*/*.index")
    index.write_bytes(index.read_bytes()[: 5 * 24 + 7])
    rows_file = index.with_suffix(".rows")
    rows_file.write_bytes(rows_file.read_bytes()[: 8 * 4096 + 100])
    job, text = trained(lab, tmp_path, Setup(), CACHED, f"run.cache_root={root}")
    assert "12 to compute" in text and "11 of them computed now" in text
    assert_close(job, cached[0])


def build_slowly(config: Path, root: Path) -> None:
    """Fills a cache picture by picture, each on the disk at once, with time in between to be killed."""
    feature_fill.BATCH, feature_cache._COMMIT_S = 1, 0.0
    computed = feature_fill.frozen_features

    def slow(model: BaseModel, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return computed(model, pixels)

    feature_fill.frozen_features = slow
    main(["cache", "build", "--cfg-path", str(config), "--root", str(root), "--options", "run.num_workers=0"])


def test_a_build_killed_by_a_signal_goes_on_where_it_was(lab: Lab, cached: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    process = lab.process(build_slowly, lab.home / "proof.yaml", root)
    end = time.monotonic() + 60
    while sum(path.stat().st_size for path in root.glob("*/*.index")) < 3 * 24:
        assert time.monotonic() < end and process.exitcode is None
        time.sleep(0.01)
    process.kill()
    process.join(30)
    kept = sum(path.stat().st_size for path in root.glob("*/*.index")) // 24
    assert 3 <= kept < 16
    job, text = trained(lab, tmp_path, Setup(), CACHED, f"run.cache_root={root}")
    assert f"{16 - kept} of them computed now" in text
    assert_close(job, cached[0])


def test_canaries_are_asked_about_cached_pictures(lab: Lab, tmp_path: Path) -> None:
    cfg, model, datasets = setting(lab, CACHED, f"run.cache_root={tmp_path}")
    picture = str(lab.home / "3.png")
    valid = replace(cfg.run.valid, canaries=[CanaryConfig("who?", picture), CanaryConfig("what?")], num_canaries=1)
    cfg = replace(cfg, run=replace(cfg.run, valid=valid))
    expected = frozen_features(model, canary_processor(model)(open_image(picture))[None])[0]
    features = use_cache(cfg, model, datasets, single("cpu"), 2)
    task = ImageTextPretrainTask()
    own, words, held_out = Validator(cfg, model, task, datasets[-1:], single("cpu"), features).canaries
    torch.testing.assert_close(as_floats(own.images[0]), expected)
    assert not words.images and as_floats(held_out.images[0]).shape == expected.shape
    answers = answer_samples(model, [own, words, held_out].__getitem__, range(3), GenerateOptions(max_new_tokens=3), 2)
    assert len(answers) == 3


def test_a_dry_run_predicts_and_writes_nothing(lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = setting(lab, CACHED, f"run.cache_root={tmp_path / 'cache'}")[0]
    with caplog.at_level("INFO", logger="minigpt4"):
        assert dry_run(cfg) == 0
    assert "vision cache: disk, 17 pictures of 4.1 kB = 69.6 kB" in caplog.text
    assert not (tmp_path / "cache").exists()


def setting(lab: Lab, *options: str) -> tuple[Config, GenerationMixin, list[Any]]:
    catalog.load()
    cfg = load_config(lab.home / "proof.yaml", ["run.num_workers=0", *options])
    model = build_model(cfg, torch.device("cpu"), torch.float32)
    return cfg, model, [*build_datasets(cfg, model, "train"), *build_datasets(cfg, model, "val")]


def test_weights_and_settings_of_vision_are_its_identity_and_nothing_else(lab: Lab) -> None:
    _, model, _ = setting(lab)
    before = identity(model)
    with torch.no_grad():
        model.llama_proj.weight.add_(1)
    assert identity(model) == before
    with torch.no_grad():
        next(model.visual_encoder.parameters()).view(-1)[0].add_(1)
    assert identity(model) != before
    assert identity(setting(lab, "model.max_txt_len=50", "model.lora_r=2")[1]) == before
    changed = identity(setting(lab, "model.vision_tokens_per_position=2")[1])
    assert changed["weights"] == before["weights"] and changed != before


def test_a_freed_model_says_so_when_it_is_given_pixels(lab: Lab) -> None:
    _, model, _ = setting(lab)
    model.cfg = replace(model.cfg, vit_weights="")  # as if they were of a file
    tower = sum(p.numel() * 4 for p in (*model.visual_encoder.parameters(), *model.ln_vision.parameters()))
    assert release(model) == tower
    assert next(model.visual_encoder.parameters()).is_meta
    with pytest.raises(AssertionError, match="was freed"):
        model.encode_images(torch.zeros(1, 3, 56, 56))
    assert model.encode_images(torch.zeros(1, 4, 256)).shape[1] == 4


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_a_cache_larger_than_its_place_is_refused_before_anything_is_written(
    mode: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, model, datasets = setting(lab, f"model.cache_vision={mode}", f"run.cache_root={tmp_path / 'cache'}")
    monkeypatch.setattr(vision_cache, "free_disk", lambda _: 50_000)
    monkeypatch.setattr(vision_cache, "free_memory", lambda: 50_000)
    with pytest.raises(ConfigError, match=r"17 pictures of 4.1 kB, 17 to compute = 69.6 kB; 50 kB"):
        use_cache(cfg, model, datasets, single("cpu"), 100)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("passes", "free", "said"),
    [
        (1.9, 10**9, "off, the run makes 1.9 passes over the data"),
        (2.0, 10**9, "16 of them computed now"),
        (2.0, 100_000, "auto takes half of it at most"),
    ],
)
def test_auto_caches_where_it_pays_and_fits(
    passes: float, free: int, said: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cfg, model, datasets = setting(lab, "model.cache_vision=auto", f"run.cache_root={tmp_path / 'cache'}")
    monkeypatch.setattr(vision_cache, "free_disk", lambda _: free)
    with caplog.at_level("INFO", logger="minigpt4"):
        use_cache(cfg, model, datasets, single("cpu"), passes)
    assert said in caplog.text
    is_on = "off" not in said and "half" not in said
    assert (tmp_path / "cache").exists() is is_on and model.reads_pixels is not is_on


def test_parts_that_train_and_random_pictures_are_refused(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache_vision disk needs a frozen vision part, but freeze_vit is False"):
        setting(lab, CACHED, "model.freeze_vit=False")
    cfg, model, datasets = setting(lab, CACHED, f"run.cache_root={tmp_path}")
    model.ln_vision.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"not frozen, ln_vision trains \(2 tensors\); set it to off"):
        use_cache(cfg, model, datasets, single("cpu"), 100)
    model.ln_vision.requires_grad_(False)
    recipe = datasets[0].recipe
    datasets[0].recipe = replace(recipe, vision=Flipped(recipe.vision.cfg, recipe.vision.spec))
    with pytest.raises(ConfigError, match="vis_processor of data set 'faces' is random: Flipped"):
        use_cache(cfg, model, datasets, single("cpu"), 100)
    datasets[0] = Streamed()
    with pytest.raises(ConfigError, match="'stream' does not know its pictures"):
        use_cache(cfg, model, datasets, single("cpu"), 100)


def test_the_command_builds_checks_and_clears(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "cache"
    place = ["--cfg-path", str(lab.home / "proof.yaml"), "--root", str(root)]
    assert main(["cache", "build", *place]) == 0
    assert main(["cache", "info", "--root", str(root)]) == 0
    assert "16 pictures of 4 x 256 float32" in capsys.readouterr().out
    assert main(["cache", "verify", *place, "--sample", "5"]) == 0
    assert "recomputed 5 of 16 pictures: largest difference" in capsys.readouterr().out
    (path,) = root.glob("*/*.rows")
    path.write_bytes(b"\1" * 100 + path.read_bytes()[100:])
    assert main(["cache", "verify", "--root", str(root)]) == 1
    assert "1 with a wrong checksum" in capsys.readouterr().out
    assert main(["cache", "clear", "--root", str(root), "--space", "x"]) == 2
    assert main(["cache", "clear", "--root", str(root)]) == 0
    assert not list(root.glob("*/*"))
    assert main(["cache", "info", "--root", str(root / "no")]) == 2


def test_sizes_are_readable() -> None:
    assert [size_text(n) for n in (5, 49_152, 2_883_584, 118_226_944_000)] == [
        "5 bytes",
        "49.2 kB",
        "2.88 MB",
        "118.2 GB",
    ]
