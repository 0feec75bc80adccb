"""docs/CONFIG_REFERENCE.md: written from the source, complete, and good to read on GitHub."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from minigpt4 import catalog
from minigpt4.common import legacy_keys
from minigpt4.common.config import load_config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, DatasetConfig, ModelConfig, RunConfig
from minigpt4.common.yaml_source import Problems, Source, apply_options
from minigpt4.tools import config_reference as reference
from tests.config_fakes import REPOSITORY


@pytest.fixture(scope="module")
def page() -> str:
    return reference.render()


def config_classes() -> list[type[Any]]:
    """Every dataclass whose fields a YAML file may hold."""
    catalog.load()
    found: list[type[Any]] = [ModelConfig, DatasetConfig, RunConfig]
    found += [registry.get("model", name).Config for name in reference.names("model")]
    for name in reference.names("builder"):
        found += [registry.get("builder", name).Config, registry.get("builder", name).Info]
    for cls in list(found):
        found += reference.nested(reference.keys(cls))
    return list(dict.fromkeys(found))


def test_the_committed_page_is_what_the_source_says(page: str) -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == page, f"out of date; run: {reference.COMMAND}"


def test_every_key_says_what_it_means() -> None:
    silent = [
        f"{cls.__module__}.{cls.__name__}.{item.name}"
        for cls in config_classes()
        for item in dataclasses.fields(cls)
        if len(reference.meanings(cls).get(item.name, "")) < 5
    ]
    assert silent == []


def test_every_key_stands_on_the_page(page: str) -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    for cls in config_classes():
        assert {item.name for item in dataclasses.fields(cls)} <= rows, cls


@dataclass(frozen=True)
class Inner:
    """Keys inside a key."""

    depth: int = 0  # how deep


@dataclass(frozen=True)
class Base:
    """A section."""

    kind: str = "base"  # which class
    size: int = 3  # a | b, <c> and `d|e`
    text: str = ""  # empty
    rows: list[str] = field(
        default_factory=lambda: ["a"],
    )  # behind the bracket
    inner: Inner = field(default_factory=Inner)  # one of them
    more: list[Inner] = field(default_factory=list)  # several


@dataclass(frozen=True)
class Derived(Base):
    """A section that a name selects."""

    kind: str = "derived"
    size: int = 4
    text: str = ""  # said anew
    own: float | None = None  # added


@dataclass(frozen=True)
class Silent(Base):
    """A field without a comment."""

    odd: int = 0


def test_a_field_without_a_comment_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"Silent\.odd needs a comment"):
        reference.keys(Silent)


def test_a_table_shows_key_type_default_and_meaning() -> None:
    table, *_ = reference.key_tables("base", reference.keys(Base), {})
    assert table.splitlines() == [
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `kind` | text | `base` | which class |",
        r"| `size` | integer | `3` | a \| b, \<c> and `d\|e` |",
        '| `text` | text | `""` | empty |',
        '| `rows` | list of text | `["a"]` | behind the bracket |',
        "| `inner` | [mapping](#base-inner-more) |  | one of them |",
        "| `more` | [list of mapping](#base-inner-more) | `[]` | several |",
    ]


def test_keys_inside_a_key_get_a_table_of_their_own_once() -> None:
    links: dict[type[Any], str] = {}
    _, *inner = reference.key_tables("base", reference.keys(Base), links)
    assert inner[:2] == ["### `base`: `inner`, `more`", "Keys inside a key."]
    assert inner[2].endswith("| `depth` | integer | `0` | how deep |")
    assert len(reference.key_tables("base", reference.keys(Base), links)) == 1


def test_a_subclass_shows_what_it_adds_or_means_otherwise() -> None:
    rows = [(key.name, key.default, key.meaning) for key in reference.changed(Derived, Base, "kind")]
    assert rows == [("size", 4, "a | b, <c> and `d|e`"), ("text", "", "said anew"), ("own", None, "added")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("auto", "auto"),
        ("env://", "env://"),
        ("", '""'),
        ("\n", r'"\n"'),
        ("[INST] {} [/INST]", '"[INST] {} [/INST]"'),
        ("yes", '"yes"'),
        ("1e-5", '"1e-5"'),
        (True, "true"),
        (None, "null"),
        (0.0, "0.0"),
        ([], "[]"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_a_default_is_written_as_yaml_reads_it(value: object, text: str) -> None:
    assert reference.default_text(value) == text
    assert yaml.safe_load(text) == value


def tables_of(page: str) -> list[list[list[str]]]:
    """Tables -> rows -> source text of the cells, as a Markdown reader splits them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    found: list[list[list[str]]] = []
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(tokens[place + 1].content)
    return found


def test_a_markdown_reader_sees_whole_tables(page: str) -> None:
    tables = tables_of(page)
    assert len(tables) == len(re.findall(r"^\|( --- \|)+$", page, re.MULTILINE))
    for head, *rows in tables:
        assert rows, head
        assert all(len(row) == len(head) for row in rows)
        assert all(cell for row in rows for name, cell in zip(head, row, strict=True) if name != "default")


def test_no_text_is_read_as_html(page: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    inner = [child for token in tokens for child in token.children or ()]
    assert not [token.content for token in [*tokens, *inner] if token.type.startswith("html")]


def test_every_link_leads_to_a_heading(page: str) -> None:
    anchors = [reference.slug(line.lstrip("# ")) for line in re.findall(r"^#+ .*", page, re.MULTILINE)]
    assert len(set(anchors)) == len(anchors)
    targets = re.findall(r"\]\(#([^)]*)\)", page)
    assert targets and set(targets) <= set(anchors)


def test_the_page_is_the_same_whatever_a_user_has_registered(monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    entries = {kind: {**known} for kind, known in registry._entries.items()}
    entries["format"]["mine"] = len
    entries["model"]["mine"] = type("Mine", (), {"Config": Silent, "__module__": "my_models"})
    monkeypatch.setattr(registry, "_entries", entries)
    assert reference.render() == page


def test_the_sections_of_the_page_are_those_of_a_file(page: str) -> None:
    (table,) = (table for table in tables_of(page) if table[0] == ["section", "meaning"])
    assert [row[0].strip("`") for row in table[1:]] == [item.name for item in dataclasses.fields(Config)]


def test_every_environment_variable_of_the_package_is_on_the_page(page: str) -> None:
    used = set()
    for path in (REPOSITORY / "minigpt4").rglob("*.py"):
        used |= set(re.findall(r"environ[^\n]*[\"'](MINIGPT4_\w+)", path.read_text(encoding="utf-8")))
    (table,) = (table for table in tables_of(page) if table[0] == ["environment variable", "meaning"])
    assert used and used <= {row[0].strip("`") for row in table[1:]}


def test_both_spellings_of_options_on_the_page_say_the_same(page: str) -> None:
    read = []
    for line in re.findall(r"^minigpt4 train .*", page, re.MULTILINE):
        source, problems = Source("x", {}, {}), Problems()
        apply_options(source, shlex.split(line.partition("--options ")[2]), problems)
        assert problems.lines == []
        read.append(source.data)
    assert len(read) == 2 and read[0] == read[1]
    assert read[0] == {"run": {"init_lr": 1e-5}, "datasets": {"my_faces": {"batch_size": 4}}}


def old_keys(page: str, head: str) -> dict[str, str]:
    (table,) = (table for table in tables_of(page) if table[0] == ["key", head])
    return {row[0].strip("`"): row[1] for row in table[1:]}


def test_every_older_key_that_is_read_is_on_the_page(page: str) -> None:
    handled = set(re.findall(r'if "(\w+)" in run', inspect.getsource(legacy_keys._upgrade_run)))
    written = {key.removeprefix("run.") for key in {**reference.READ_AS, **reference.UNUSED}}
    assert handled - {"precision"} == written
    read_as, ignored = old_keys(page, "read as"), old_keys(page, "ignored, because")
    assert {"model.llm", "model.init_from", "run.amp", "datasets.gpt4affectnet"} <= set(read_as)
    assert {"preprocess", "run.valid_splits", "model.load_finetuned", "datasets.NAME.type"} <= set(ignored)


def test_an_older_key_does_what_the_page_says(tmp_path: Path, caplog: pytest.LogCaptureFixture, page: str) -> None:
    text = (REPOSITORY / "train_configs" / "quickstart_photos.yaml").read_text(encoding="utf-8")
    values = {"amp": "False", "wandb_log": "True"}
    keys = {
        key: values.get(key.removeprefix("run."), "1")
        for key in [*old_keys(page, "read as"), *old_keys(page, "ignored, because")]
        if key.startswith("run.")
    }
    (tmp_path / "old.yaml").write_text(text, encoding="utf-8")
    cfg = load_config(tmp_path / "old.yaml", [f"{key}={value}" for key, value in keys.items()], check_data=False)
    warned = {record.getMessage().split(": ")[1] for record in caplog.records if "minigpt4" in record.name}
    assert warned == set(keys)
    assert cfg.run.precision == "fp32" and "wandb" in cfg.run.trackers


@pytest.fixture
def own_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "docs" / "PAGE.md")
    (tmp_path / "docs").mkdir()
    return reference.PAGE


def test_the_command_writes_the_page_and_then_finds_it_up_to_date(own_page: Path, page: str) -> None:
    assert reference.main(["--check"]) == 1
    assert reference.main([]) == 0
    assert own_page.read_text(encoding="utf-8") == page
    assert reference.main(["--check"]) == 0


def test_a_page_out_of_date_is_left_alone_and_the_command_is_named(
    own_page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_page.write_text("old", encoding="utf-8")
    assert reference.main(["--check"]) == 1
    assert capsys.readouterr().err.rstrip().endswith("out of date; run: python -m minigpt4.tools.config_reference")
    assert own_page.read_text(encoding="utf-8") == "old"


def test_outside_of_a_checkout_the_page_has_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "none" / "PAGE.md")
    with pytest.raises(ConfigError, match="belongs to a checkout"):
        reference.main([])
