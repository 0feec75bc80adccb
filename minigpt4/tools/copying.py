"""``minigpt4 cp``: a shipped YAML file as the start of your own."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.common.files import write_atomically
from minigpt4.common.yaml_source import REPOSITORY_ROOT, find_existing
from minigpt4.datasets.cards import find_card, known_cards
from minigpt4.tools.listing import PRESETS, example_files

_CONFIG_HEADER = """\
# A copy of {origin}. {use}:
#   {command}
"""
_CARD_HEADER = """\
# A copy of the card of data set '{name}': its defaults, to edit. Nothing reads this file by itself.
# Put the block below under `datasets:` of a training YAML, where it may have one of two names:
#   - {name}: your values lie over the shipped card; keep the lines that differ and delete the others.
#   - a name of your own: the block stands for itself; keep builder, format and build_info.
# Relative paths start at the current directory, the YAML file, the repository root or MINIGPT4_DATA (default ./data).
# Add batch_size, and sample_ratio when there are several data sets.
#
"""


def main(argv: Sequence[str]) -> int:
    """Copy one file; returns the exit code. Raises ConfigError for an unknown name and for a file that exists."""
    given = build_parser().parse_args(argv)
    source, card = find(given.name)
    target = destination(given.dest, f"{card}.yaml" if card else source.name)
    _refuse_taken(target, source, given.force)
    text = card_text(source, card) if card else config_text(source, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text)
    except OSError as error:
        raise ConfigError(f"'{target}' cannot be written: {error.strerror}") from error
    print(f"wrote {target} from {_label(source)}")
    if card:
        print("next: put its block under datasets: of a training YAML")
    elif _is_preset(source):
        print(f"next: write into a training YAML beside it: {_command(source, target)}")
    else:
        print(f"next: {_command(source, target)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 cp``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 cp",
        description="Copy a shipped YAML file, or the card of a data set, to edit.\n"
        "`minigpt4 ls config` and `minigpt4 ls dataset` list the names.",
        epilog="examples:\n  minigpt4 cp minigptv2_finetune_gpt4vision_Full my_run.yaml\n"
        "  minigpt4 cp quickstart_photos my_configs/\n  minigpt4 cp sharegpt_detail",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="a file of train_configs/ or eval_configs/, or a data set")
    parser.add_argument(
        "dest", metavar="DEST", nargs="?", default=".", help="file or directory/ to write to (default: here)"
    )
    parser.add_argument("--force", action="store_true", help="replace DEST when it exists")
    return parser


def find(name: str) -> tuple[Path, str]:
    """The file that ``name`` means, and the data set when it is a card, else "". Raises ConfigError."""
    configs = {path.stem: path for path in example_files()}
    stem = Path(name).name.removesuffix(".yaml")
    # a path, as `minigpt4 ls config` prints it or as `include:` has it
    written = find_existing(name, (Path.cwd(), REPOSITORY_ROOT, REPOSITORY_ROOT / "train_configs"))
    if stem in configs and (name in (stem, f"{stem}.yaml") or written == configs[stem]):
        return configs[stem], ""
    card = find_card(name)
    if card is not None:
        return card, name
    near = nearest(stem, [*configs, *known_cards()])
    hint = "`minigpt4 ls config` and `minigpt4 ls dataset` list the known ones"
    raise ConfigError(f"unknown config or data set '{name}'{near}; {hint}")


def destination(dest: str, file_name: str) -> Path:
    """The file to write: ``dest``, or ``file_name`` below it where it is a directory or ends with a slash.

    Raises ConfigError for a place where no file can be.
    """
    if not dest:
        raise ConfigError("DEST is empty; give a file that ends with .yaml, or a directory")
    target = Path(dest)
    if dest.endswith(("/", os.sep)):
        if target.exists() and not target.is_dir():
            raise ConfigError(f"'{target}' is a file, not a directory")
        return target / file_name
    if target.is_dir():
        return target / file_name
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"'{target}' is no directory and no YAML file; write '{target}/' or '{target}.yaml'")
    if target.parent.exists() and not target.parent.is_dir():
        raise ConfigError(f"'{target.parent}' is a file, not a directory")
    if not target.parent.exists():
        raise ConfigError(f"'{target.parent}': no such directory; '{target.parent}/' as DEST makes it")
    return target


def _refuse_taken(target: Path, source: Path, force: bool) -> None:
    if target.is_dir():
        raise ConfigError(f"'{target}' is a directory")
    if target.resolve() == source.resolve():
        raise ConfigError(f"'{target}' is the shipped file itself; choose another DEST")
    if os.path.lexists(target) and not force:  # also a link that leads nowhere
        raise ConfigError(f"'{target}' exists; choose another name, or replace it with --force")


def config_text(source: Path, target: Path) -> str:
    """The file under a line that says where it is from and how to run it; commands in its comments run the copy.

    A job name that repeats the file's is left out: the copy's own file name takes its place, so that a copy under
    another name has job folders of its own, which matters to ``--resume auto``.
    """
    use = "Use it in a YAML file beside it" if _is_preset(source) else "Run it"
    header = _CONFIG_HEADER.format(origin=_label(source), use=use, command=_command(source, target))
    body = source.read_text(encoding="utf-8").replace(f"--cfg-path {_label(source)}", f"--cfg-path {_quoted(target)}")
    if _is_preset(source):
        body = body.replace(f"   include: {source.parent.name}/{source.name}", "")
    return header + re.sub(rf"^  job_name: {re.escape(source.stem)}\n", "", body, flags=re.MULTILINE)


def card_text(source: Path, name: str) -> str:
    """The card under an explanation of how its block is used."""
    return _CARD_HEADER.format(name=name) + source.read_text(encoding="utf-8")


def _command(source: Path, target: Path) -> str:
    if _is_preset(source):
        return f"include: {target.name}"
    if source.parent.name == "eval_configs":
        return f"minigpt4 chat --cfg-path {_quoted(target)} --image PICTURE"
    return f"minigpt4 train --cfg-path {_quoted(target)}"


def _is_preset(source: Path) -> bool:
    return source.parent == REPOSITORY_ROOT / PRESETS


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _label(path: Path) -> str:
    return path.relative_to(REPOSITORY_ROOT).as_posix()
