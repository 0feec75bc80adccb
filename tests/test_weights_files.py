"""Weights are found, or the place for them is named; files open without running code, or say what is wrong."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.models.minigpt_v2 import MiniGPTv2
from minigpt4.models.weights import find_weights, read_state, read_weights, weights_root
from tests.golden_cases import build_config, load_case
from tests.published_files import split_case

V2 = "c_minigptv2_lora_instruction"
STATE = {"llama_proj.weight": torch.ones(2, 3)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with a weights folder beside it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path / "store"))
    return tmp_path


def test_a_file_is_found_where_it_is_named_or_by_name_in_the_weights_folder(folder: Path) -> None:
    (folder / "store" / "x.pth").touch()
    assert find_weights("elsewhere/x.pth", "model.ckpt") == folder / "store" / "x.pth"
    (folder / "here" / "elsewhere").mkdir()
    (folder / "here" / "elsewhere" / "x.pth").touch()
    assert find_weights("elsewhere/x.pth", "model.ckpt") == Path("elsewhere/x.pth")


def test_the_weights_folder_is_beside_the_program_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_WEIGHTS", "")
    assert weights_root() == Path("weights")


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    """Address of a server that hands out the files of ``web``."""
    (folder / "web").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_a_model_may_all_be_web_addresses(folder: Path, web: str) -> None:
    case = load_case(V2)
    files = {key: f"{web}/{Path(path).name}" for key, path in split_case(case, folder / "web").items()}
    model = MiniGPTv2.from_config(build_config(case, **files), torch.device("cpu"), torch.float32)
    assert model.load_reports[-1].loaded == {"LoRA": 12, "llama_proj": 2}
    assert sorted(path.name for path in (folder / "store").glob("*.pth")) == ["checkpoint_3.pth", "tower.pth"]


def test_a_scheme_that_cannot_be_downloaded_is_named() -> None:
    with pytest.raises(ConfigError, match="model.ckpt: 's3://bucket/x.pth' cannot be downloaded"):
        find_weights("s3://bucket/x.pth", "model.ckpt")


@pytest.mark.parametrize("key", ["model", "module", "state_dict", ""])
def test_tensors_are_found_under_the_usual_keys(key: str, tmp_path: Path) -> None:
    torch.save({key: STATE, "epoch": 3} if key else STATE, tmp_path / "x.pth")
    assert read_state(tmp_path / "x.pth").keys() == STATE.keys()


def test_a_file_of_an_old_torch_version_opens(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state(tmp_path / "x.bin")["llama_proj.weight"], torch.ones(2, 3))


def test_lora_settings_come_from_the_file_s_own_configuration(tmp_path: Path) -> None:
    config = {"model": {"lora_r": 64, "lora_alpha": 16, "arch": "minigpt_v2"}}
    torch.save({"model": STATE, "config": config}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").lora == {"lora_r": 64, "lora_alpha": 16}
    text = "model:\n  lora_alpha: 8\n  lora_target_modules: [q_proj]\n"
    step = save_checkpoint(tmp_path / "job", 1, weights=STATE, config_text=text, manifest={}, resume=None, keep_last=1)
    assert read_weights(step).lora == {"lora_alpha": 8, "lora_target_modules": ["q_proj"]}


def test_a_file_with_pickled_objects_names_them_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"model": STATE, "config": OmegaConf.create({"a": 1})}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"it holds omegaconf\.\S+, and loading that runs code"):
        read_state(tmp_path / "x.pth")

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": STATE, "x": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match="loading that runs code"):
        read_state(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, not weights"),
        (b"", "is cut short at 0 bytes"),
        (b"some text", "not a readable"),
    ],
)
def test_what_is_no_weights_file_says_what_it_is(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_short_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    state = {"a": torch.zeros(1000)}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"is cut short|not a readable safetensors"):
        read_state(path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_state(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no such weights file"):
        read_state(tmp_path / "y.pth")
