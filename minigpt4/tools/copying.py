"""``minigpt4 cp``: a shipped YAML file as the start of your own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minigpt4.common.errors import ConfigError, nearest
from minigpt4.common.yaml_source import REPOSITORY_ROOT
from minigpt4.datasets.cards import find_card, known_cards
from minigpt4.tools.listing import example_files

_CONFIG_HEADER = """\
# A copy of {origin}. Run it:
#   {command}
"""
_CARD_HEADER = """\
# A copy of the card of data set '{name}': its defaults, to edit.
# Nothing reads this file by itself. Put the block below under `datasets:` of a training YAML:
#   - under the name {name}, your values lie over the shipped card; keep the lines that differ and delete the others.
#   - under a name of your own, the block stands for itself; keep builder, format and build_info.
# Relative paths start at the current directory, the YAML file, the repository root or MINIGPT4_DATA (default ./data).
# Add batch_size, and sample_ratio when there are several data sets.
"""


def main(argv: Sequence[str]) -> int:
    """Copy one file; returns the exit code. Raises ConfigError for an unknown name and for a file that exists."""
    given = build_parser().parse_args(argv)
    source, is_card = find(given.name)
    file_name = f"{given.name}.yaml" if is_card else source.name
    target = destination(given.dest, file_name, given.force)
    text = card_text(source, given.name) if is_card else config_text(source, target)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"'{target}' cannot be written: {error.strerror}") from error
    print(f"wrote {target} from {_label(source)}")
    if is_card:
        print("next: put its block under datasets: of your training YAML")
    else:
        print(f"next: {_command(source, target)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``minigpt4 cp``."""
    parser = argparse.ArgumentParser(
        prog="minigpt4 cp",
        description="Copy a shipped YAML file, or the card of a data set, to edit. `minigpt4 ls` shows the names.",
        epilog="examples:\n  minigpt4 cp minigptv2_finetune_gpt4vision_Full my_run.yaml\n"
        "  minigpt4 cp quickstart_photos my_configs/\n  minigpt4 cp sharegpt_detail my_faces.yaml --force",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="a file of train_configs/ or eval_configs/, or a data set")
    parser.add_argument("dest", metavar="DEST", help="file to write, or a directory (a new one ends with /)")
    parser.add_argument("--force", action="store_true", help="replace DEST when it exists")
    return parser


def find(name: str) -> tuple[Path, bool]:
    """The file that ``name`` means, and whether it is a card. Raises ConfigError that lists the names."""
    configs = {path.stem: path for path in example_files()}
    stem = Path(name).name.removesuffix(".yaml")
    if stem in configs and (stem == name or name in (f"{stem}.yaml", _label(configs[stem]))):
        return configs[stem], False
    card = find_card(name)
    if card is not None:
        return card, True
    known = [*configs, *known_cards()]
    raise ConfigError(f"unknown config or data set '{name}'{nearest(stem, known)}; known: {', '.join(known)}")


def destination(dest: str, file_name: str, force: bool) -> Path:
    """The file to write; makes a directory that is spelled with a closing slash. Raises ConfigError when taken."""
    target = Path(dest)
    if dest.endswith("/"):
        if target.exists() and not target.is_dir():
            raise ConfigError(f"'{target}' is a file, not a directory")
        target.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        target = target / file_name
    if not target.parent.is_dir():
        raise ConfigError(f"'{target.parent}': no such directory; '{target.parent}/' as DEST makes it")
    if target.is_dir():
        raise ConfigError(f"'{target}' is a directory")
    if target.exists() and not force:
        raise ConfigError(f"'{target}' exists; choose another name, or replace it with --force")
    return target


def config_text(source: Path, target: Path) -> str:
    """The file under a line that says where it is from and how to run it."""
    header = _CONFIG_HEADER.format(origin=_label(source), command=_command(source, target))
    return header + source.read_text(encoding="utf-8")


def card_text(source: Path, name: str) -> str:
    """The card under an explanation of how its block is used."""
    return _CARD_HEADER.format(name=name) + source.read_text(encoding="utf-8")


def _command(source: Path, target: Path) -> str:
    if source.parent.name == "eval_configs":
        return f"minigpt4 chat --cfg-path {target} --image PICTURE"
    return f"minigpt4 train --cfg-path {target}"


def _label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY_ROOT))
