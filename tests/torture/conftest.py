"""One fork server and one run that nobody disturbs, for all files of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.resume_harness import Lab, Setup, newest, open_lab

ALONE = Setup()
SPLIT = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint")
"""What ranks of a split model import besides."""


@pytest.fixture(scope="package")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("lab"), SPLIT) as opened:
        yield opened


@pytest.fixture(scope="package")
def undisturbed(lab: Lab) -> Path:
    """The finished job of one rank."""
    folder = lab.home / "undisturbed"
    lab.start(folder, ALONE).done()
    return newest(folder)
