"""What files of vision weights hold, remembered beside the features: a full cache needs no tower to be read.

Features are found by a hash of every value of the vision weights. ``<root>/weights/*.json`` says which hash the files
of a configuration came to, by their path, size, times and inode.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from minigpt4.common.dist import DistContext
from minigpt4.common.errors import OutputError
from minigpt4.common.files import write_atomically
from minigpt4.common.schema import Config
from minigpt4.models.base_model import BaseModel
from minigpt4.models.frozen_vision import feature_shape, identity

log = logging.getLogger(__name__)

FOLDER = "weights"


def asked_in(root: Path, cfg: Config, dist: DistContext) -> Callable[[str], bool] | None:
    """Whether the weights of a ``vision_key`` are known below ``root``, the same answer on every rank; None where
    features do not stay on disk."""
    if cfg.model.cache_vision not in ("disk", "auto"):
        return None
    return lambda key: bool(dist.broadcast_object(bool(key) and any((root / FOLDER).glob(f"{key}-*.json"))))


def described(model: BaseModel, root: Path | None, dist: DistContext) -> tuple[dict[str, str], tuple[int, int]]:
    """``identity`` and ``feature_shape`` of a model; from the record where there is one and the tower was not read.

    Every rank must call it.
    """
    known: tuple[dict[str, str], tuple[int, int]] | None = None
    if not model.has_vision and root is not None and dist.is_main:
        known = _read(_path(root, model))
    known = dist.broadcast_object(known)
    if known is not None:
        return known
    model.load_vision()
    about: dict[str, str] = dist.broadcast_object(identity(model) if dist.is_main else None)
    shape = feature_shape(model)
    if root is not None and dist.is_main and model.vision_key:
        try:  # without a record the tower is read again the next time, that is all
            _path(root, model).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(_path(root, model), json.dumps({"about": about, "shape": shape}, indent=1))
        except (OSError, OutputError) as error:
            log.debug("vision cache: no record of what the weight files hold: %s", error)
    return about, shape


def clear_records(root: Path) -> int:
    """Forgets what files hold; returns the bytes that were freed."""
    paths = list((root / FOLDER).glob("*.json"))
    size = sum(path.stat().st_size for path in paths)
    for path in paths:
        path.unlink()
    return size


def _path(root: Path, model: BaseModel) -> Path:
    """The record of a model, whose place and dtype decide what its files come to in memory."""
    dtypes = f"{model.vision_dtype()}-{model.dtype}".replace("torch.", "")
    return root / FOLDER / f"{model.vision_key}-{dtypes}.json"


def _read(path: Path) -> tuple[dict[str, str], tuple[int, int]] | None:
    """A record that is there and whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        positions, channels = content["shape"]
        return {str(key): str(value) for key, value in content["about"].items()}, (int(positions), int(channels))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("vision cache: '%s' cannot be read (%s): the weights are read instead", path, error)
        return None
