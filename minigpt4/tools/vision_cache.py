"""``minigpt4 cache``: what ``model.cache_vision`` and ``run.cache_images`` keep, without a training run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from minigpt4.common.dist import DistContext
    from minigpt4.common.schema import Config
    from minigpt4.datasets.collate import SampleDataset
    from minigpt4.datasets.feature_cache import FeatureStore
    from minigpt4.models.generation import GenerationMixin
    from minigpt4.runners.vision_cache import Pictures

EXAMPLES = """\
examples:
  minigpt4 cache build --cfg-path train_configs/my.yaml
  torchrun --nproc-per-node 8 -m minigpt4 cache build --cfg-path train_configs/my.yaml
  minigpt4 cache info --root /fast/vision_cache
  minigpt4 cache verify --cfg-path train_configs/my.yaml --sample 200
  minigpt4 cache clear --root /fast/vision_cache --space 3f0a

The folder is --root, else run.cache_root, MINIGPT4_CACHE, or vision_cache in run.output_dir."""
_MOST_DIFFERENT = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Largest difference of recomputed features, over their largest value, that rounding and batching explain."""


def main(argv: Sequence[str]) -> int:
    """One of build, info, verify, clear; returns the exit code. Raises MiniGPT4Error for mistakes of the user."""
    given = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked

    from minigpt4 import catalog
    from minigpt4.common.logger import setup_logging

    setup_logging(is_main=os.environ.get("RANK", "0") == "0")
    catalog.load()
    actions = {"build": build, "info": info, "verify": verify, "clear": clear}
    return actions[given.action](given)


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 cache``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 cache",
        description="Fill, look at, check and empty the cache of frozen vision features and decoded pictures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, summary in (
        ("build", "compute what a run with cache_vision: disk would compute first"),
        ("info", "entries, bytes, and which weights they are of"),
        ("verify", "checksums of everything; with --cfg-path also recompute a sample"),
        ("clear", "remove features and pictures"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        is_built = name == "build"
        action.add_argument("--cfg-path", required=is_built, metavar="FILE", help="YAML with model, datasets and run")
        action.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the file's")
        action.add_argument("--root", metavar="DIR", help="folder of the cache")
        if name in ("verify", "clear"):
            action.add_argument("--space", default="", metavar="KEY", help="first letters of one key that info prints")
        if name == "verify":
            action.add_argument("--sample", type=int, default=64, metavar="N", help="pictures to recompute (64)")
    return parser


def build(given: argparse.Namespace) -> int:
    """Fills the cache of a YAML's data sets, on every rank of torchrun."""
    from minigpt4.runners.vision_cache import use_cache

    with opened(given) as (cfg, model, dist):
        use_cache(cfg, model, all_datasets(cfg, model), dist, float("inf"))
    return 0


def info(given: argparse.Namespace) -> int:
    """Prints one block per set of features or pictures."""
    from minigpt4.runners.vision_cache import size_text

    root = root_of(given)
    stores = stores_in(root)
    print(f"{root}: {len(stores)} sets of features or pictures")
    for store in stores:
        space, size = store.space, sum(path.stat().st_size for path in store.folder.iterdir())
        shape = " x ".join(map(str, space.shape))
        print(f"\n{space.key}")
        print(f"  entries  {len(store):,} pictures of {shape} {space.dtype}, {size_text(size)} on disk")
        for key, value in {**space.notes, **space.about}.items():
            print(f"  {key:<9}{value}" if len(key) < 9 else f"  {key} {value}")
    return 0


def verify(given: argparse.Namespace) -> int:
    """Checks what is stored; 1 when something is wrong."""
    root, wrong = root_of(given), 0
    stores = chosen(stores_in(root), given.space)
    for store in stores:
        damaged = list(store.damaged())
        print(f"{store.space.key}: {len(store):,} pictures, {store.lost} cut off, {len(damaged)} with a wrong checksum")
        for path, row in damaged[:8]:
            print(f"  {path}, row {row}")
        wrong += store.lost + len(damaged)
    if given.cfg_path:
        wrong += recompute(given, root)
    if wrong:
        hint = "`minigpt4 cache clear` removes them, the next run computes them again"
        print(f"{wrong} entries are wrong; {hint}", file=sys.stderr)
    return int(wrong > 0)


def recompute(given: argparse.Namespace, root: Path) -> int:
    """How many of a sample of the YAML's pictures have other features than those stored; prints the largest difference.

    Raises DataError when none is stored.
    """
    from minigpt4.datasets.map_dataset import MapDataset
    from minigpt4.runners.vision_cache import find_pictures

    with opened(given) as (cfg, model, dist):
        sets = [dataset for dataset in all_datasets(cfg, model) if isinstance(dataset, MapDataset)]
        pictures = find_pictures(model, sets, root, dist)
        known = [number for number in range(len(pictures.wanted.pictures)) if pictures.place(number) >= 0]
        if not known:
            raise DataError(f"'{root}' holds no features of these pictures, this model and this preparation")
        sample = Random(0).sample(known, min(given.sample, len(known)))
        worst, wrong = 0.0, 0
        for number in sample:
            difference = _difference(model, pictures, number)
            worst = max(worst, difference)
            wrong += difference > _MOST_DIFFERENT[str(model.dtype).removeprefix("torch.")]
        print(
            f"recomputed {len(sample)} of {len(known):,} pictures: largest difference {worst:.2e} of the largest value"
        )
    return wrong


def _difference(model: GenerationMixin, pictures: Pictures, number: int) -> float:
    """Largest difference of a picture's features, stored and computed now, over the largest value."""
    from minigpt4.datasets.pictures import encoded
    from minigpt4.models.frozen_vision import frozen_features

    picture = pictures.wanted.pictures[number]
    stored = pictures.stores[picture.preparation].rows()(pictures.place(number)).float()
    made = frozen_features(model, picture.pixels(encoded(picture.source))[None])[0].float()
    return float((made - stored).abs().max() / made.abs().max())


def clear(given: argparse.Namespace) -> int:
    """Removes all sets, or one."""
    from minigpt4.datasets.feature_cache import clear_names, clear_space
    from minigpt4.runners.vision_cache import size_text
    from minigpt4.runners.vision_records import clear_records

    root = root_of(given)
    stores = stores_in(root)
    selected = chosen(stores, given.space)
    freed = sum(clear_space(root, store.space.key) for store in selected)
    if len(selected) == len(stores):
        freed += clear_names(root) + clear_records(root)
    print(f"{root}: removed {len(selected)} of {len(stores)} sets, {size_text(freed)}")
    return 0


@contextmanager
def opened(given: argparse.Namespace) -> Iterator[tuple[Config, GenerationMixin, DistContext]]:
    """Configuration with ``cache_vision: disk``, model and ranks. Raises MiniGPT4Error."""
    from minigpt4.common import dist
    from minigpt4.common.config import load_config
    from minigpt4.runners.parts import build_model, choose_precision

    root = [f"run.cache_root={given.root}"] if given.root else []
    cfg = load_config(given.cfg_path, [*given.options, *root, "model.cache_vision=disk"])
    context = dist.init(cfg.run)
    try:
        precision = choose_precision(cfg.run.precision, context.device)
        yield cfg, build_model(cfg, context.device, precision), context
    finally:
        context.close()


def all_datasets(cfg: Config, model: GenerationMixin) -> list[SampleDataset]:
    """Training and held-out data sets."""
    from minigpt4.runners.parts import build_datasets

    return [*build_datasets(cfg, model, "train"), *build_datasets(cfg, model, "val")]


def root_of(given: argparse.Namespace) -> Path:
    """The folder that the flags, a YAML or the environment mean. Raises ConfigError when it is none."""
    from minigpt4.common.config import load_config
    from minigpt4.runners.vision_cache import cache_root

    if given.root:
        root = Path(given.root).expanduser()
    elif given.cfg_path:
        root = cache_root(load_config(given.cfg_path, given.options, check_data=False, check_weights=False))
    elif os.environ.get("MINIGPT4_CACHE"):
        root = Path(os.environ["MINIGPT4_CACHE"]).expanduser()
    else:
        raise ConfigError("which cache? Give --root or --cfg-path, or set MINIGPT4_CACHE")
    if not root.is_dir():
        raise ConfigError(f"'{root}' is no folder; nothing was cached there yet")
    return root


def stores_in(root: Path) -> list[FeatureStore]:
    """Every set of features below ``root``."""
    from minigpt4.datasets.feature_cache import FeatureStore, read_spaces

    return [FeatureStore(root, space) for space in read_spaces(root)]


def chosen(stores: Sequence[FeatureStore], start: str) -> list[FeatureStore]:
    """Those whose key begins with ``start``. Raises ConfigError when there is none."""
    found = [store for store in stores if store.space.key.startswith(start)]
    if start and not found:
        known = ", ".join(store.space.key for store in stores) or "none"
        raise ConfigError(f"--space: no key begins with '{start}'; keys: {known}")
    return found
