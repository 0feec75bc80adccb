"""From a YAML file and ``--options`` to a checked, frozen ``Config``. Knows no torch.

Later wins: defaults of the dataclass, the YAML of ``arch`` + ``model_type`` (or the card of a data set), the user's
file, ``--options``. Options are merged before any name is resolved, so they may choose the defaults too.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from minigpt4.common.config_file import ConfigFile
from minigpt4.common.config_run import check_parallel, check_validation, read_run
from minigpt4.common.errors import ConfigError, MiniGPT4Error, nearest
from minigpt4.common.legacy_keys import drop_unused, drop_unused_in_datasets, upgrade_sections
from minigpt4.common.schema import Config, DatasetConfig, ModelConfig
from minigpt4.common.section import build_section
from minigpt4.common.types import IMAGE_TAG
from minigpt4.common.yaml_include import merge_included
from minigpt4.common.yaml_source import (
    PACKAGE_ROOT,
    REPOSITORY_ROOT,
    Problems,
    Source,
    apply_options,
    find_existing,
    literal,
    read_source,
    resolve_references,
)
from minigpt4.datasets.cards import find_card, known_cards

MODEL_DEFAULTS = PACKAGE_ROOT / "configs" / "models"
PATCH_SIZES = {"eva_clip_g": 14}
"""Vision towers whose patches are known before one is built; the others check themselves while they are built."""


@dataclass(frozen=True)
class PlannedImage:
    """What a builder's ``check`` may know about pixels before a model exists."""

    size: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, check_data: bool = True, check_weights: bool = True
) -> Config:
    """Reads and checks everything that can be checked without weights.

    ``overrides``: tokens of ``--options``, ``a.b=v c.d=w`` or ``a.b v c.d w``. ``check_data=False`` is for chat and
    evaluation on a machine without the training data: files of data sets and of a resume may be missing, and
    builders are not asked. ``check_weights=False`` is for a plan and for a look at the data: weights may be missing.
    Raises ConfigError with one line per mistake: file and line, key, what was found, what is allowed.
    """
    problems = Problems()
    found = find_existing(str(path), (Path.cwd(), REPOSITORY_ROOT)) or Path(path)
    source = read_source(found, problems)
    merge_included(source, found.resolve().parent, problems)
    apply_options(source, overrides, problems)
    resolve_references(source, problems)
    _refuse_other_programs(source)
    upgrade_sections(source, lambda name: find_card(name) is not None, problems)
    roots = (Path.cwd(), found.resolve().parent, REPOSITORY_ROOT)
    file = ConfigFile(source, problems, roots, check_data, check_weights)
    _load_plugins(file)
    model = _model(file)
    run = read_run(file)
    drop_unused_in_datasets(source, model.image_size if model else None, problems)
    datasets = _datasets(file, model)
    check_parallel(file, model, run)
    check_validation(file, run, datasets)
    evaluation = _evaluation_datasets(file)
    problems.raise_any()
    assert model is not None and run is not None
    return Config(model=model, datasets=datasets, run=run, evaluation_datasets=evaluation)


def _refuse_other_programs(source: Source) -> None:
    """One line for a file that shares nothing with ours, instead of one per key."""
    if any(isinstance(source.data.get(name), dict) for name in ("model", "run", "datasets")):
        return
    found = ", ".join(list(source.data)[:8]) or "nothing"
    raise ConfigError(
        f"{source.label}: is a configuration of another program (found: {found}); expected the sections "
        "model, datasets and run; `minigpt4 ls config` lists files to start from"
    )


def dump_config(cfg: Config) -> str:
    """YAML text that ``load_config`` reads back to an equal Config on a machine with the same files.

    Files of the package itself are written relative to it; weights that moved are found under MINIGPT4_WEIGHTS.
    """
    content = dataclasses.asdict(cfg)
    prompt_path = Path(cfg.model.prompt_path)
    if prompt_path.is_relative_to(PACKAGE_ROOT):
        content["model"]["prompt_path"] = str(prompt_path.relative_to(REPOSITORY_ROOT))
    for block in content["datasets"].values():
        del block["name"]
    return OmegaConf.to_yaml(OmegaConf.create(literal(content)))


def import_plugins(names: Iterable[str]) -> None:
    """Imports a user's own modules, also those beside where the program was started. Raises ConfigError."""
    for name in names:
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # stays: loader workers import the module again
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"plugin '{name}' cannot be imported: {error}") from error


def _load_plugins(file: ConfigFile) -> None:
    run = file.source.data.get("run")
    names = run.get("plugins") if isinstance(run, dict) else None
    for name in names if isinstance(names, list) else []:
        try:
            import_plugins([str(name)])
        except ConfigError as error:
            file.complain("run.plugins", str(error))


def _model(file: ConfigFile) -> ModelConfig | None:
    content = file.section("model")
    if content is None:
        return None
    arch = content.get("arch", ModelConfig.arch)
    model_class = file.named("model", arch, "model.arch")
    if model_class is None:
        return None
    drop_unused(file.source, "model", content, [item.name for item in dataclasses.fields(model_class.Config)])
    layers = [(file.source, "model", content)]
    defaults = _model_defaults(file, str(arch), content.get("model_type"))
    if defaults is not None:
        layers.insert(0, (defaults, "model", defaults.data["model"]))
    model: ModelConfig | None = build_section(model_class.Config, layers, "model", file.problems)
    if model is None:
        return None
    _check_patches(file, model)
    if model.chat_format != "auto":
        file.named("template", model.chat_format, "model.chat_format")
    changes: dict[str, Any] = {"llama_model": file.language_model(model.llama_model)}
    for key in ("vit_weights", "q_former_model", "ckpt"):
        value = getattr(model, key, "")  # q_former_model belongs to architectures with a Q-Former
        if value and value != "random":
            changes[key] = file.weights(f"model.{key}", value)
    if model.prompt_path:
        changes["prompt_path"] = _prompt_file(file, model.prompt_path)
    return dataclasses.replace(model, **changes)


def _check_patches(file: ConfigFile, model: ModelConfig) -> None:
    size = model.vit_config.get("patch_size", PATCH_SIZES.get(model.vit_model))
    if isinstance(size, int) and size > 0 and model.image_size % size:
        low = max(model.image_size // size, 1) * size
        message = f"{model.image_size} is not divisible by the patch size {size} of vit_model '{model.vit_model}'"
        file.complain("model.image_size", f"{message}; nearest: {low} or {low + size}")


def _model_defaults(file: ConfigFile, arch: str, model_type: Any) -> Source | None:
    """The YAML of this variant; None for an architecture that has none (a plugin's, say)."""
    known = {path.stem.removeprefix(f"{arch}-"): path for path in sorted(MODEL_DEFAULTS.glob(f"{arch}-*.yaml"))}
    if not model_type or not known:
        return None
    if str(model_type) not in known:
        message = f"unknown model_type '{model_type}' of arch '{arch}'{nearest(str(model_type), known)}"
        file.complain("model.model_type", f"{message}; known: {', '.join(known)}")
        return None
    source = read_source(known[str(model_type)], file.problems)
    resolve_references(source, file.problems)
    return source


def _prompt_file(file: ConfigFile, value: str) -> str:
    """Checks the prompt list and keeps its prompts for data sets that bring none."""
    path = file.path("model.prompt_path", value, extra=(PACKAGE_ROOT / "configs",))
    if Path(path).is_file():
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        file.default_prompts = [line for line in lines if IMAGE_TAG in line]
        if not file.default_prompts:
            file.complain("model.prompt_path", f"'{value}' has no line with {IMAGE_TAG}; one prompt per line")
    elif Path(path).exists():
        file.complain("model.prompt_path", f"'{value}' is a directory, expected a text file, one prompt per line")
    return path


def _datasets(file: ConfigFile, model: ModelConfig | None) -> dict[str, DatasetConfig]:
    content = file.section("datasets")
    if content is None:
        return {}
    result: dict[str, DatasetConfig] = {}
    for name, block in content.items():
        if block is not None and not isinstance(block, dict):
            file.complain(f"datasets.{name}", f"found {block!r}, expected a mapping")
            continue
        dataset = _dataset(file, str(name), block or {}, model)
        if dataset is not None:
            result[str(name)] = dataset
    if file.check_data and not content:
        file.complain("datasets", f"is empty; name a data set, known: {', '.join(known_cards())}")
    _check_ratios(file, result)
    return result


def _check_ratios(file: ConfigFile, datasets: Mapping[str, DatasetConfig]) -> None:
    absent = [name for name, dataset in datasets.items() if dataset.sample_ratio is None]
    missing = [name for name in absent if f"datasets.{name}.sample_ratio" not in file.problems.keys]
    if missing and len(missing) < len(datasets):
        message = "sample_ratio must be given for all data sets or for none"
        file.complain("datasets", f"{message}; missing in: {', '.join(missing)}")
    if datasets and all(dataset.sample_ratio == 0 for dataset in datasets.values()):
        file.complain("datasets", "sample_ratio is 0 for every data set; nothing would be drawn")


def _dataset(file: ConfigFile, name: str, block: dict[str, Any], model: ModelConfig | None) -> DatasetConfig | None:
    key = f"datasets.{name}"
    layers = [(file.source, key, block)]
    card = find_card(name)
    if card is not None:
        source = read_source(card, file.problems)
        resolve_references(source, file.problems)
        layers.insert(0, (source, *_card_block(source, name)))
    elif not ("build_info" in block and ("format" in block or "builder" in block)):
        message = f"unknown data set{nearest(name, known_cards())}; a new name needs build_info and format (or builder)"
        file.complain(key, f"{message}; known: {', '.join(known_cards())}")
        return None
    if block.get("name", name) != name:
        file.complain(f"{key}.name", f"found '{block['name']}', expected '{name}', the name of the block")
    layers.append((file.source, key, {"name": name}))
    chosen = [values["builder"] for _, _, values in layers if "builder" in values]
    builder = file.named("builder", chosen[-1] if chosen else DatasetConfig.builder, f"{key}.builder")
    if builder is None:
        return None
    dataset: DatasetConfig | None = build_section(builder.Config, layers, key, file.problems)
    if dataset is None:
        return None
    _check_names(file, key, dataset)
    before = len(file.problems.lines)
    must_exist = file.check_data and dataset.sample_ratio != 0  # a set that is never drawn needs no files
    dataset = _with_paths(file, key, dataset, must_exist)
    if must_exist and len(file.problems.lines) == before:
        image = PlannedImage(model.image_size if model else ModelConfig.image_size)
        for message in _builder_check(builder, dataset, image, file.default_prompts):
            part, _, rest = message.partition(": ")
            is_key = f"{key}.{part}" in file.source.origins  # 'build_info.ann_path: ...' has a line of its own
            file.complain(f"{key}.{part}" if is_key else key, rest if is_key else message)
    return dataset


def _builder_check(builder: Any, dataset: DatasetConfig, image: PlannedImage, prompts: Sequence[str]) -> list[str]:
    try:
        messages: list[str] = builder(dataset, image, tuple(prompts)).check()
    except MiniGPT4Error as error:
        return str(error).splitlines()
    return messages


def _card_block(source: Source, name: str) -> tuple[str, dict[str, Any]]:
    """Where the values start in a card: at its root, or under ``datasets: {<name>: ...}`` as in MiniGPT-4."""
    nested = source.data.get("datasets")
    if not isinstance(nested, dict):
        return "", source.data
    return f"datasets.{name}", nested[name]


def _check_names(file: ConfigFile, key: str, dataset: DatasetConfig) -> None:
    if dataset.format not in ("", "auto"):
        file.named("format", dataset.format, f"{key}.format")
    for group in ("vis_processor", "text_processor"):
        for split in ("train", "eval"):
            processor = getattr(getattr(dataset, group), split)
            if processor.name:
                file.named("processor", processor.name, f"{key}.{group}.{split}.name")


def _with_paths(file: ConfigFile, key: str, dataset: DatasetConfig, must_exist: bool) -> DatasetConfig:
    changes: dict[str, Any] = {"build_info": file.build_info(f"{key}.build_info", dataset.build_info, must_exist)}
    if dataset.prompts_file:
        inner = f"{key}.prompts_file"
        look_up = file.path if must_exist else file.path_if_there
        changes["prompts_file"] = look_up(inner, dataset.prompts_file)
    if dataset.val.ann_path:
        found = file.data_path(f"{key}.val.ann_path", dataset.val.ann_path, must_exist)
        changes["val"] = dataclasses.replace(dataset.val, ann_path=found)
    return dataclasses.replace(dataset, **changes)


def _evaluation_datasets(file: ConfigFile) -> dict[str, dict[str, Any]]:
    """The section as written; evaluation scripts know their own keys."""
    if "evaluation_datasets" not in file.source.data:
        return {}
    content = file.section("evaluation_datasets") or {}
    for name, block in content.items():
        if not isinstance(block, dict):
            file.complain(f"evaluation_datasets.{name}", f"found {block!r}, expected a mapping")
    return content
