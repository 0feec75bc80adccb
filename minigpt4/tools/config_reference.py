"""``docs/CONFIG_REFERENCE.md``: every key of a YAML file, written from the config classes and their comments.

::

    python -m minigpt4.tools.config_reference           writes the page
    python -m minigpt4.tools.config_reference --check   exit code 1 when the page is not what would be written

The meaning of a key is the comment behind its field. A new key, model or builder needs nothing here.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from minigpt4 import catalog
from minigpt4.cli import report_errors
from minigpt4.common import legacy_keys
from minigpt4.common.errors import ConfigError
from minigpt4.common.files import write_atomically
from minigpt4.common.registry import registry
from minigpt4.common.schema import DatasetConfig, ModelConfig, RunConfig
from minigpt4.common.section import describe
from minigpt4.common.yaml_source import REPOSITORY_ROOT, shown
from minigpt4.tools.listing import WRITTEN_IN, comment_of, description, entries, model_types

PAGE = REPOSITORY_ROOT / "docs" / "CONFIG_REFERENCE.md"
PACKAGE = "minigpt4"
COMMAND = "python -m minigpt4.tools.config_reference"
NAMED_KINDS = ("template", "format", "processor", "task", "runner", "lr_scheduler", "metric", "face_set", "dataset")
"""Kinds whose names get one table each; models and builders get sections."""

_INTRO = f"""\
# Configuration reference

Every key of a YAML file, with its type, default and meaning. `minigpt4 ls` lists the names that values may take, and
`minigpt4 cp NAME` copies a shipped file to edit.

This page is written by `{COMMAND}` from the source; change the comments there."""

_FILE = """\
## A file

| section | meaning |
| --- | --- |
| `model` | architecture, backbones, prompts, initial weights: [keys](#model) |
| `datasets` | one block per data set, by name: [keys](#datasetsname) |
| `run` | schedule, checkpoints, validation, logs: [keys](#run) |
| `evaluation_datasets` | read by evaluation scripts, which know its keys; may be absent |

Every section is checked as a whole before anything is loaded. Each mistake gives one line with file, line number, key,
what was found and what is allowed.

### Layers

Later wins:

1. the defaults in the tables below, of the class that `model.arch`, `datasets.NAME.builder` or `run.runner` names;
2. the YAML of `model.arch` + `model.model_type`, or the card of a known data set (`minigpt4 ls dataset`);
3. your file;
4. `--options`.

Mappings are merged key by key at every depth, anything else is replaced. Options are merged before names are looked up,
so they choose the defaults too: `--options model.model_type=pretrain_llama2`.

### `--options`

```bash
minigpt4 train --cfg-path my_run.yaml --options run.init_lr=1e-5 datasets.my_faces.batch_size=4
minigpt4 train --cfg-path my_run.yaml --options run.init_lr 1e-5 datasets.my_faces.batch_size 4
```

The first token decides which of the two spellings is read. Values are YAML (`'run.trackers=[terminal, wandb]'`), text
that is not YAML is taken as it stands, and `model.ckpt=` empties a value.

### References and paths

`${oc.env:NAME,default}` stands for an environment variable, `${section.key}` for another value of the file.

A relative path is looked for from the current directory, the folder of the YAML file and the repository root, in this
order. Paths of data sets may also start at `MINIGPT4_DATA`; weights that are found nowhere are looked for by file name
in `MINIGPT4_WEIGHTS`. Text that an example leaves to you (`path/to/...`, `<...>`, `???`) is refused as a placeholder.

| environment variable | meaning |
| --- | --- |
| `MINIGPT4_DATA` | folder of the published data sets, as the cards name them; default `./data` |
| `MINIGPT4_WEIGHTS` | folder of language models, vision towers and checkpoints; default `./weights` |
| `MINIGPT4_CACHE` | `run.cache_root`, the folder of both caches; default `<output_dir>/vision_cache` |"""

READ_AS = {
    "run.amp": "`run.precision`: `True` is `auto`, `False` is `fp32`",
    "run.wandb_log": "`run.trackers`: `True` adds `wandb`",
}
"""Older keys that legacy_keys.py turns into values of other keys; its tables hold the plain renames."""
UNUSED = {"run.valid_splits": "what is held out is named by datasets.X.val, what is measured on it by run.valid"}
"""Older keys that legacy_keys.py drops outside of its tables."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code. Raises ConfigError for a field without a comment."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write docs/CONFIG_REFERENCE.md from the source.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is out of date")
    given = parser.parse_args(argv)
    if not PAGE.parent.is_dir():
        raise ConfigError(f"'{PAGE.parent}': no such directory; the page belongs to a checkout of the repository")
    text = render()
    if not given.check:
        write_atomically(PAGE, text)
        print(f"wrote {shown(PAGE)}")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        print(f"{shown(PAGE)} is up to date")
        return 0
    print(f"{shown(PAGE)} is out of date; run: {COMMAND}", file=sys.stderr)
    return 1


def render() -> str:
    """The whole page. The same source gives the same text; plugins that are loaded do not appear."""
    catalog.load()
    parts = [_FILE, *model_part(), *dataset_part(), *run_part(), *names_part(), *legacy_part()]
    headings = [line for part in parts for line in part.splitlines() if line.startswith("## ")]
    contents = "\n".join(f"- [{line[3:]}](#{slug(line[3:])})" for line in headings)
    return "\n\n".join([_INTRO, contents, *parts]) + "\n"


def model_part() -> list[str]:
    """Common keys, then what each architecture adds or changes."""
    links: dict[type[Any], str] = {}
    blocks = ["## `model`", own_words(ModelConfig), *key_tables("model", keys(ModelConfig), links)]
    for name in names("model"):
        model = registry.get("model", name)
        blocks += [f"### `model.arch: {name}`", sentence(description(model))]
        blocks += key_tables("model", changed(model.Config, ModelConfig, "arch"), links)
        for path in model_types():
            arch, _, model_type = path.stem.partition("-")
            if arch == name:
                values = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
                given = ", ".join(code(f"{key}: {default_text(value)}") for key, value in values.items())
                blocks.append(f"- `model_type: {model_type}`: {sentence(comment_of(path))} It sets {given}.")
    return blocks


def dataset_part() -> list[str]:
    """Common keys, then every builder with its ``build_info``."""
    place, links = "datasets.NAME", dict[type[Any], str]()
    blocks = [f"## `{place}`", own_words(DatasetConfig), *key_tables(place, keys(DatasetConfig), links)]
    for name in names("builder"):
        builder = registry.get("builder", name)
        blocks += [f"### `{place}.builder: {name}`", sentence(description(builder))]
        blocks += key_tables(place, changed(builder.Config, DatasetConfig, "builder"), links)
        parent, inherited = _parent(builder)
        added = [key for key in keys(builder.Info) if key not in inherited]
        like = f" is that of [`{parent}`](#{slug(f'{place}.builder: {parent}')})" if parent else ""
        blocks.append(f"`build_info`{like}{', and' if like and added else ''}{':' if added else '.'}")
        blocks += key_tables(f"{place}.build_info", added, links, builder.required)
    return blocks


def run_part() -> list[str]:
    """Common keys, then what each runner adds or changes."""
    links: dict[type[Any], str] = {}
    blocks = ["## `run`", own_words(RunConfig), *key_tables("run", keys(RunConfig), links)]
    for name in names("runner"):
        runner = registry.get("runner", name)
        own = changed(getattr(runner, "Config", RunConfig), RunConfig, "runner")
        if own:
            blocks += [f"### `run.runner: {name}`", sentence(description(runner)), *key_tables("run", own, links)]
    return blocks


def names_part() -> list[str]:
    """Names that values may take, kind by kind."""
    blocks = ["## Names", "What `minigpt4 ls` prints; your own modules (`run.plugins`) add to it."]
    for kind in NAMED_KINDS:
        known = entries(kind)
        chosen = known if kind == "dataset" else names(kind)
        rows = [(code(name), escaped(known[name])) for name in chosen]
        blocks += [f"### {kind}", f"For {escaped(WRITTEN_IN[kind])}.", markdown_table(("name", "meaning"), rows)]
    return blocks


def legacy_part() -> list[str]:
    """What became of the keys of older files."""
    old = legacy_keys
    renamed = {f"{part}.{key}": f"`{part}.{new}`" for part, pairs in old.RENAMED.items() for key, new in pairs.items()}
    renamed |= {f"datasets.{key}": f"`datasets.{new}`" for key, new in old.RENAMED_DATASETS.items()}
    dropped = {**old.DROPPED_SECTIONS, **UNUSED}
    dropped |= {f"{part}.{key}": why for part, reasons in old.DROPPED.items() for key, why in reasons.items()}
    in_datasets = {key.replace("processor.", "processor.SPLIT."): why for key, why in old.DROPPED_IN_DATASETS.items()}
    dropped |= {f"datasets.NAME.{key}": why for key, why in in_datasets.items()}
    return [
        "## Keys of older files",
        "Files of MiniGPT-4, MiniGPT-v2 and the first MiniGPTFace load as they are. A key of these tables gives one\n"
        "warning line; one that the chosen architecture or runner declares is read as its own.",
        markdown_table(("key", "read as"), [(code(key), text) for key, text in {**renamed, **READ_AS}.items()]),
        markdown_table(("key", "ignored, because"), [(code(key), escaped(why)) for key, why in dropped.items()]),
        "A data set's `type` other than `default` and an `image_size` other than the model's are refused,\n"
        "because they would change a run.",
    ]


def names(kind: str) -> list[str]:
    """Registered names whose objects the package itself defines."""
    return [name for name in registry.names(kind) if registry.get(kind, name).__module__.startswith(f"{PACKAGE}.")]


def _parent(builder: Any) -> tuple[str, list[Key]]:
    """The registered builder whose ``build_info`` is extended, with its keys; an empty name for none."""
    known = {registry.get("builder", name): name for name in names("builder")}
    for other in builder.__mro__[1:]:
        if other in known and issubclass(builder.Info, other.Info):
            return known[other], keys(other.Info)
    return "", []


@dataclass(frozen=True)
class Key:
    """A field of a config class: its annotation, its default and its comment."""

    name: str
    hint: Any
    default: Any
    meaning: str


def keys(cls: type[Any]) -> list[Key]:
    """The fields of a dataclass in their order. Raises ConfigError for a field without a comment."""
    hints, said = typing.get_type_hints(cls), meanings(cls)
    found = []
    for item in dataclasses.fields(cls):
        if item.name not in said:
            raise ConfigError(f"{cls.__module__}: {cls.__name__}.{item.name} needs a comment that says what it means")
        made = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        found.append(Key(item.name, hints[item.name], made, said[item.name]))
    return found


def meanings(cls: type[Any]) -> dict[str, str]:
    """Field -> the comment behind it, of the class itself or of the nearest parent that has one."""
    said: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if dataclasses.is_dataclass(parent):
            said |= _own_comments(parent)
    return said


@functools.cache  # finding the source of a class parses its whole module
def _own_comments(cls: type[Any]) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {
        node.target.id: comments[node.end_lineno]
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in comments
    }


def changed(cls: type[Any], base: type[Any], chosen_by: str) -> list[Key]:
    """The keys that ``cls`` adds to ``base`` or means otherwise, without the key whose value chooses the class."""
    common = keys(base)
    return [key for key in keys(cls) if key not in common and key.name != chosen_by]


def key_tables(place: str, rows: Sequence[Key], links: dict[type[Any], str], required: Sequence[str] = ()) -> list[str]:
    """A table of ``rows``, then one under a heading of its own for every mapping of known keys among them.

    ``links``: dataclass -> anchor of its table; what has one is not written again, and new ones are added.
    """
    inner = {cls: ", ".join(map(code, places)) for cls, places in nested(rows).items() if cls not in links}
    links |= {cls: slug(f"{place}: {title}") for cls, title in inner.items()}
    blocks = [table(rows, links, required)] if rows else []
    for cls, title in inner.items():
        blocks += [f"### {code(place)}: {title}", own_words(cls), table(keys(cls), links)]
    return blocks


def nested(rows: Iterable[Key], prefix: str = "") -> dict[type[Any], list[str]]:
    """Dataclasses inside ``rows`` -> the keys, dotted, that take them."""
    found: dict[type[Any], list[str]] = {}
    for key in rows:
        inner = _dataclass_in(key.hint)
        if inner is not None:
            found.setdefault(inner, []).append(prefix + key.name)
            for deeper, places in nested(keys(inner), f"{prefix}{key.name}.").items():
                found.setdefault(deeper, []).extend(places)
    return found


def _dataclass_in(hint: Any) -> type[Any] | None:
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return part
    return None


def table(rows: Iterable[Key], links: Mapping[type[Any], str], required: Sequence[str] = ()) -> str:
    """key | type | default | meaning; ``links``: where the keys of a dataclass stand."""
    cells = []
    for key in rows:
        inner = _dataclass_in(key.hint)
        kind = type_text(key.hint) if inner is None else f"[{type_text(key.hint)}](#{links[inner]})"
        default = "required" if key.name in required else _shown_default(key)
        cells.append((code(key.name), kind, default, escaped(key.meaning)))
    return markdown_table(("key", "type", "default", "meaning"), cells)


def _shown_default(key: Key) -> str:
    return "" if dataclasses.is_dataclass(key.default) else code(default_text(key.default))


def type_text(hint: Any) -> str:
    """A type as in error messages, without articles."""
    return re.sub(r"\ban? ", "", describe(hint))


def default_text(value: Any) -> str:
    """``value`` as YAML would have it, on one line."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.:/-]*", value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)


def own_words(cls: type[Any]) -> str:
    """The first paragraph of a docstring."""
    return escaped(" ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split()))


def sentence(text: str) -> str:
    """``text`` for Markdown, with a full stop."""
    return escaped(text) + "."


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown; a pipe inside a cell is escaped, in code too."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """``text`` in a typewriter face."""
    return f"`{text}`"


def escaped(text: str) -> str:
    """Prose for Markdown: parts in backticks stay code, signs that Markdown would read are shown."""
    parts = text.replace("``", "`").split("`")
    plain = [re.sub(r"([\\<*])", r"\\\1", part) for part in parts[::2]]
    parts[::2] = plain
    return "`".join(parts)


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    sys.exit(report_errors(main))
