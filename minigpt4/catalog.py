"""The one list of modules whose import registers the names that YAML may use."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from minigpt4.common.config import import_plugins

MODULES = (
    "minigpt4.common.optim",  # lr_scheduler
    "minigpt4.conversation.templates",  # template
    "minigpt4.processors.image",  # processor
    "minigpt4.processors.text",
    "minigpt4.metrics.answers",  # metric
    "minigpt4.datasets.formats",  # format
    "minigpt4.datasets.talks",
    "minigpt4.datasets.builders.align",  # builder
    "minigpt4.datasets.builders.annotations",
    "minigpt4.datasets.builders.faces",
    "minigpt4.datasets.builders.published",
    "minigpt4.datasets.builders.shards",
    "minigpt4.models.minigpt4",  # model
    "minigpt4.models.minigpt_v2",
    "minigpt4.tasks.image_text_pretrain",  # task
    "minigpt4.runners.runner_base",  # runner
    "minigpt4.evaluation.faces.readers.own",  # face_set
    "minigpt4.evaluation.faces.readers.expressions",
    "minigpt4.evaluation.faces.readers.people",
    "minigpt4.evaluation.faces.readers.facexbench",
)


def load(plugins: Iterable[str] = ()) -> None:
    """Imports every module of MODULES, then a user's own ``plugins``. Raises ConfigError for a missing plugin.

    Modules named in ``run.plugins`` are imported by ``load_config``; this argument is for programs without a YAML.
    """
    for name in MODULES:
        importlib.import_module(name)
    import_plugins(plugins)
