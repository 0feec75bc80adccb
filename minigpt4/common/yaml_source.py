"""A YAML file as plain values that remember where they were written, with ``--options`` on top."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.common.schema import DatasetConfig, ModelConfig, RunConfig

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
REPOSITORY_ROOT = PACKAGE_ROOT.parent
_NUMBER = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
_REFERENCE = re.compile(r"(\\*)\$\{")
_UNSET = re.compile(r"Environment variable '([^']+)' not found")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with ``1e-5`` read as a number (PyYAML reads text), and dates and '=' left as text.

    Only true and false are booleans, as in YAML 1.2: ``sanity: off`` is a word. A key that is a boolean takes on, off,
    yes and no all the same.
    """


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0].rpartition(":")[2] not in ("timestamp", "value", "bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


@dataclass
class Problems:
    """Every mistake found so far, one line each, in the order found."""

    lines: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def add(self, where: str, key: str, message: str) -> None:
        """``where``: file and line, or --options. ``key``: dotted, may be empty."""
        line = ": ".join(part for part in (where, key, " ".join(message.split())) if part)
        self.keys.add(key)
        if line not in self.lines:
            self.lines.append(line)

    def raise_any(self) -> None:
        """Raises ConfigError with all lines when there are any."""
        if self.lines:
            raise ConfigError("\n".join(self.lines))


@dataclass
class Source:
    """Plain values of one file. ``origins`` maps dotted keys to 'file:line' or '--options'."""

    label: str
    data: dict[str, Any]
    origins: dict[str, str]

    def where(self, key: str) -> str:
        """Where ``key`` or the nearest mapping around it was written."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return self.label

    def move(self, old: str, new: str) -> None:
        """Lets ``new`` and what lies below answer with the place of ``old``."""
        for key, origin in list(self.origins.items()):
            if key == old or key.startswith(f"{old}."):
                self.origins.setdefault(new + key[len(old) :], origin)


def shown(path: Path) -> str:
    """``path`` as messages print it: relative where it lies below the current directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_source(path: Path, problems: Problems) -> Source:
    """Reads a mapping. Duplicate keys are collected; raises ConfigError for a file that holds none."""
    label = shown(path)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [item.name for item in path.parent.glob("*.y*ml")]
        raise ConfigError(f"{label}: no such file{nearest(path.name, siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{label}: cannot be read as UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from None
    source = Source(label, {}, {})
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = "nothing" if node is None else f"a {_node_kind(node)}"
            raise ConfigError(f"{label}: holds {found}; expected a mapping with the sections model, datasets, run")
        source.data = _Builder(loader, source, problems).mapping(node, "", ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{label}{line}: not valid YAML: {error.problem or error.context}") from None
    finally:
        loader.dispose()
    return source


def _node_kind(node: yaml.Node) -> str:
    return str(node.tag).rpartition(":")[2].replace("seq", "list").replace("str", "text").replace("map", "mapping")


@dataclass
class _Builder:
    """YAML nodes -> plain values; keys stay as written (``on:`` is not True)."""

    loader: _Loader
    source: Source
    problems: Problems

    def value(self, node: yaml.Node, key: str, parents: tuple[int, ...]) -> Any:
        if id(node) in parents:
            raise ConfigError(f"{self.source.label}:{node.start_mark.line + 1}: {key}: an anchor that contains itself")
        inside = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, inside)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{key}.{index}", inside) for index, item in enumerate(node.value)]
        return self.loader.construct_object(node, deep=True)

    def mapping(self, node: yaml.MappingNode, prefix: str, parents: tuple[int, ...]) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for name, _ in node.value:
            key, line = f"{prefix}.{name.value}" if prefix else str(name.value), name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                place = f"{self.source.label}:{line}"
                raise ConfigError(f"{place}: {prefix}: a key must be text, found a {_node_kind(name)}")
            if key in lines and name.value != "<<":
                message = f"written twice, first on line {lines[key]}; keep one"
                self.problems.add(f"{self.source.label}:{line}", key, message)
            lines[key] = line
        self.loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for name, value in node.value:
            key = f"{prefix}.{name.value}" if prefix else str(name.value)
            self.source.origins[key] = f"{self.source.label}:{name.start_mark.line + 1}"
            result[str(name.value)] = self.value(value, key, parents)
        return result


def apply_options(source: Source, tokens: Sequence[str], problems: Problems) -> None:
    """Writes ``a.b=v c.d=w`` or ``a.b v c.d w`` over ``source``; the first token decides which."""
    for key, text in _pairs(tokens, problems):
        value = _option_value(text)
        parts = key.split(".")
        if len(parts) < 2 or not all(parts):
            problems.add("--options", key, f"names nothing{owner_hint(key)}; write section.key, e.g. run.seed=1")
            continue
        target: Any = source.data
        for depth, part in enumerate(parts[:-1]):
            inner = target.get(part)
            if inner is None:
                inner = target[part] = {}
                source.origins.setdefault(".".join(parts[: depth + 1]), "--options")
            if not isinstance(inner, dict):
                above = ".".join(parts[: depth + 1])
                problems.add("--options", key, f"names nothing; {above} is a {type(inner).__name__}, not a mapping")
                break
            target = inner
        else:
            target[parts[-1]] = value
            source.origins[key] = "--options"


def _option_value(text: str) -> Any:
    """YAML where it is YAML; '[INST] {} [/INST]', '###' and 'a # b' are text, and 'model.ckpt=' empties a path."""
    try:
        value = yaml.load(text, Loader=_Loader) if text else ""
    except yaml.YAMLError:
        return text
    is_plain = isinstance(value, str) and text[:1] not in ("'", '"')
    return text if is_plain or (value is None and text.startswith("#")) else value


def owner_hint(key: str) -> str:
    """`` (did you mean 'run.seed'?)`` for a key written without its section, or an empty string."""
    owners = {"run": RunConfig, "model": ModelConfig, "datasets.NAME": DatasetConfig}
    found = [section for section, cls in owners.items() if key in {item.name for item in fields(cls)}]
    return f" (did you mean '{found[0]}.{key}'?)" if found else ""


def _pairs(tokens: Sequence[str], problems: Problems) -> list[tuple[str, str]]:
    if not tokens:
        return []
    if "=" in tokens[0]:
        for token in tokens:
            if "=" not in token:
                problems.add("--options", token, "has no '='; write a.b=v c.d=w or a.b v c.d w")
        return [(key, text) for key, found, text in (token.partition("=") for token in tokens) if found]
    pairs, rest = [], list(tokens)
    while rest:
        key, found, text = rest.pop(0).partition("=")  # a program may add its own a.b=v to a user's list
        if found or rest:
            pairs.append((key, text if found else rest.pop(0)))
        else:
            problems.add("--options", key, "has no value; write a.b=v c.d=w or a.b v c.d w")
    return pairs


def resolve_references(source: Source, problems: Problems) -> None:
    """Replaces ``${oc.env:NAME,default}`` and ``${section.key}`` in place; a value that cannot be had is dropped."""
    source.data = _drop_broken(source, source.data, "", problems)
    source.data = _resolved(source, OmegaConf.create(source.data), "", problems)


def _drop_broken(source: Source, value: Any, prefix: str, problems: Problems) -> Any:
    """``value`` without text that OmegaConf cannot parse; creating the whole would name no key."""
    if isinstance(value, Mapping):
        inner = f"{prefix}." if prefix else ""
        pairs = ((key, _drop_broken(source, item, f"{inner}{key}", problems)) for key, item in value.items())
        return {key: item for key, item in pairs if item is not _BROKEN}
    if isinstance(value, list):
        items = (_drop_broken(source, item, f"{prefix}.{index}", problems) for index, item in enumerate(value))
        return [item for item in items if item is not _BROKEN]
    if isinstance(value, str) and "${" in value:
        try:
            OmegaConf.create([value])
        except OmegaConfBaseException:
            problems.add(source.where(prefix), prefix, f"found '{value}'; a reference reads ${{oc.env:NAME,default}}")
            return _BROKEN
    return value


_BROKEN = object()


def _resolved(source: Source, node: DictConfig | ListConfig, prefix: str, problems: Problems) -> Any:
    keys: list[Any] = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
    result: dict[Any, Any] = {}
    for key in keys:
        name = f"{prefix}.{key}" if prefix else str(key)
        try:
            value = node[key]
        except MissingMandatoryValue:
            problems.add(source.where(name), name, "found the placeholder '???'; give a value")
            continue
        except OmegaConfBaseException as error:
            unset = _UNSET.search(str(error))
            message = str(error).splitlines()[0]
            if unset:
                hint = f"export it or write ${{oc.env:{unset[1]},default}}"
                message = f"environment variable {unset[1]} is not set; {hint}"
            problems.add(source.where(name), name, message)
            continue
        result[key] = _resolved(source, value, name, problems) if OmegaConf.is_config(value) else value
    return result if isinstance(node, DictConfig) else list(result.values())


def literal(value: Any) -> Any:
    """``value`` with every '${' escaped, so that OmegaConf reads resolved text as it stands."""
    if isinstance(value, Mapping):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [literal(item) for item in value]
    # OmegaConf reads '\\${' as a backslash and a reference, so backslashes in front are doubled first
    return _REFERENCE.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def find_existing(text: str, roots: Sequence[Path]) -> Path | None:
    """First existing ``root / text`` as an absolute path; ``text`` may be absolute or start with ~; not empty."""
    for root in roots if text else ():
        candidate = Path(os.path.abspath(root / Path(text).expanduser()))  # absolute, links kept as the user sees them
        if candidate.exists():
            return candidate
    return None
