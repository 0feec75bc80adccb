"""What a YAML file becomes: defaults, cards, options, paths, references, and back to text."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from minigpt4 import catalog
from minigpt4.common.config import dump_config, load_config
from minigpt4.common.errors import ConfigError
from tests.config_fakes import BASE, Pairs, register_fakes, write


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small registered classes and a folder with one model and one data set."""
    register_fakes(monkeypatch, tmp_path)


def test_a_file_becomes_a_frozen_config_of_the_named_classes(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, BASE))
    assert type(cfg.model).__name__ == "ToyConfig" and cfg.model.lora_r == 8
    assert cfg.datasets["faces"].name == "faces" and cfg.datasets["faces"].fields == {"question": "q"}
    assert cfg.run.max_epoch == 2 and cfg.run.seed == 42
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.run.seed = 1  # type: ignore[misc]


def test_data_sets_keep_the_order_of_the_file(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, BASE.replace("  faces:", "  known: {}\n  faces:")))
    assert list(cfg.datasets) == ["known", "faces"]


def test_a_card_lies_under_the_users_block(tmp_path: Path) -> None:
    text = BASE.replace("run:", "  known:\n    build_info: {extra: {b: 2}}\n    sample_ratio: 1\nrun:")
    cfg = load_config(write(tmp_path, text.replace("batch_size: 2", "sample_ratio: 3")))
    known = cfg.datasets["known"]
    assert (known.builder, known.format, known.batch_size, known.sample_ratio) == ("pairs", "talk", 3, 1.0)
    assert known.build_info == {"ann_path": str(tmp_path / "faces.json"), "extra": {"a": 1, "b": 2}}


def test_a_card_may_be_written_as_in_minigpt4(tmp_path: Path) -> None:
    card = "datasets:\n  known:\n    data_type: images\n    builder: pairs\n    build_info: {ann_path: faces.json}\n"
    (tmp_path / "cards" / "known.yaml").write_text(card, encoding="utf-8")
    cfg = load_config(write(tmp_path, BASE.replace("  faces:\n", "  known: {}\n  faces:\n")))
    assert cfg.datasets["known"].builder == "pairs"


def test_a_mistake_in_a_card_names_the_card(tmp_path: Path) -> None:
    (tmp_path / "cards" / "known.yaml").write_text("builder: pairs\nformt: talk\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"^cards/known.yaml:2: datasets.known.formt: unknown key \(did you mean 'format'"
    ):
        load_config(
            write(tmp_path, BASE.replace("  faces:\n", "  known: {build_info: {ann_path: faces.json}}\n  faces:\n"))
        )


@pytest.mark.parametrize(
    "options",
    [("run.max_epoch=7", "datasets.faces.batch_size=5"), ("run.max_epoch", "7", "datasets.faces.batch_size", "5")],
)
def test_both_spellings_of_options_win_over_the_file(tmp_path: Path, options: tuple[str, ...]) -> None:
    cfg = load_config(write(tmp_path, BASE), options)
    assert (cfg.run.max_epoch, cfg.datasets["faces"].batch_size) == (7, 5)


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("model.prompt_template=[INST] {} [/INST]", "prompt_template", "[INST] {} [/INST]"),
        ("model.end_sym=###", "end_sym", "###"),
        ("model.drop_path_rate=1e-1", "drop_path_rate", 0.1),
        ("model.lora_target_modules=[k_proj, o_proj]", "lora_target_modules", ["k_proj", "o_proj"]),
        ("model.vit_config.depth=2", "vit_config", {"depth": 2}),
        ("model.ckpt=", "ckpt", ""),
        ("model.prompt_template=a=b {}", "prompt_template", "a=b {}"),
    ],
)
def test_an_option_is_read_as_yaml_where_it_is_yaml(tmp_path: Path, option: str, key: str, value: object) -> None:
    assert getattr(load_config(write(tmp_path, BASE), [option]).model, key) == value


def test_options_choose_the_defaults_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = tmp_path / "defaults"
    defaults.mkdir()
    (defaults / "toy-big.yaml").write_text("model: {image_size: 448, toy_layers: 9}\n", encoding="utf-8")
    (defaults / "toy-small.yaml").write_text("model: {image_size: 28}\n", encoding="utf-8")
    monkeypatch.setattr("minigpt4.common.config.MODEL_DEFAULTS", defaults)
    path = write(tmp_path, BASE.replace("arch: toy", "arch: toy\n  model_type: small"))
    assert load_config(path).model.image_size == 28
    big = load_config(path, ["model.model_type=big", "model.toy_layers=3"]).model
    assert (big.image_size, big.toy_layers) == (448, 3)  # type: ignore[attr-defined]


def test_an_option_may_add_a_known_data_set(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, BASE), ["datasets.known.batch_size=4"])
    assert cfg.datasets["known"].batch_size == 4


def test_relative_paths_start_here_then_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
    (there / "w.pth").write_bytes(b"")
    path = write(there, BASE.replace("lora_r: 8", "ckpt: w.pth").replace("llm_dir", str(tmp_path / "llm_dir")))
    (there / "faces.json").write_text("[]", encoding="utf-8")
    monkeypatch.chdir(here)
    assert load_config(path).model.ckpt == str(there / "w.pth")
    (here / "w.pth").write_bytes(b"")
    assert load_config(path).model.ckpt == str(here / "w.pth")


def test_a_path_may_start_at_the_repository_root(tmp_path: Path) -> None:
    cfg = load_config(write(tmp_path, BASE.replace("lora_r: 8", "ckpt: pyproject.toml")))
    assert os.path.isabs(cfg.model.ckpt) and os.path.isfile(cfg.model.ckpt)


def test_weights_may_be_missing_where_nobody_reads_them(tmp_path: Path) -> None:
    text = BASE.replace("lora_r: 8", "ckpt: path/to/gone.pth\n  vit_weights: gone.pth").replace(
        "llm_dir", "weights/none"
    )
    path = write(tmp_path, text)
    (tmp_path / "weights").mkdir()
    model = load_config(path, check_weights=False).model
    assert (model.ckpt, model.vit_weights, model.llama_model) == ("path/to/gone.pth", "gone.pth", "weights/none")
    with pytest.raises(ConfigError) as found:
        load_config(path)
    assert all(f"model.{key}: " in str(found.value) for key in ("ckpt", "vit_weights", "llama_model"))
    (tmp_path / "gone.pth").write_bytes(b"")
    assert load_config(path, check_weights=False).model.vit_weights == str(tmp_path / "gone.pth")


def test_an_id_of_the_hub_stays_as_it_is_unless_its_folder_exists(tmp_path: Path) -> None:
    path = write(tmp_path, BASE.replace("llm_dir", "meta-llama/Llama-2-7b-chat-hf"))
    assert load_config(path).model.llama_model == "meta-llama/Llama-2-7b-chat-hf"
    (tmp_path / "meta-llama").mkdir()
    with pytest.raises(ConfigError, match="'meta-llama/Llama-2-7b-chat-hf' not found"):
        load_config(path)


def test_paths_of_build_info_become_absolute_at_any_depth(tmp_path: Path) -> None:
    nested = "images: {storage: llm_dir}, storage: 'llm_dir/{00..11}.tar'"
    info = f"{{ann_path: [faces.json, faces.json], {nested}, n: faces.json}}"
    text = BASE.replace("{ann_path: faces.json}", info)
    found = load_config(write(tmp_path, text), check_data=False).datasets["faces"].build_info
    json, folder = str(tmp_path / "faces.json"), str(tmp_path / "llm_dir")
    expected = {"ann_path": [json, json], "images": {"storage": folder}, "storage": f"{folder}/{{00..11}}.tar"}
    assert found == {**expected, "n": "faces.json"}


def test_data_are_also_found_in_the_folder_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "faces.json").rename(tmp_path / "all" / "faces.json")
    monkeypatch.setenv("MINIGPT4_DATA", str(tmp_path / "all"))
    found = load_config(write(tmp_path, BASE)).datasets["faces"].build_info["ann_path"]
    assert found == str(tmp_path / "all" / "faces.json")


def test_references_read_the_environment_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_LLM", "llm_dir")
    text = BASE.replace("llama_model: llm_dir", "llama_model: ${oc.env:TOY_LLM}").replace(
        "max_epoch: 2", "seed: ${model.lora_r}"
    )
    cfg = load_config(write(tmp_path, text.replace("faces.json", "'${oc.env:TOY_UNSET,.}/faces.json'")))
    assert cfg.model.llama_model == str(tmp_path / "llm_dir")
    assert cfg.run.seed == 8
    assert cfg.datasets["faces"].build_info["ann_path"] == str(tmp_path / "faces.json")


def test_without_check_data_nothing_of_the_data_has_to_exist(tmp_path: Path) -> None:
    text = BASE.replace("{ann_path: faces.json}", "{ann_path: /path/to/faces.json, image_path: gone}")
    cfg = load_config(write(tmp_path, text), check_data=False)
    assert cfg.datasets["faces"].build_info == {"ann_path": "/path/to/faces.json", "image_path": "gone"}
    assert Pairs.seen == []


def test_a_data_set_that_is_never_drawn_needs_no_files(tmp_path: Path) -> None:
    text = BASE.replace("faces.json", "gone.json").replace("batch_size: 2", "sample_ratio: 0")
    cfg = load_config(write(tmp_path, text.replace("run:", "  known: {sample_ratio: 1}\nrun:")))
    assert [seen.name for seen, _, _ in Pairs.seen] == ["known"]
    assert cfg.datasets["faces"].sample_ratio == 0


def test_builders_are_asked_with_the_image_size_and_the_prompts_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("<Img><ImageHere></Img> Look.\nno image here\n", encoding="utf-8")
    load_config(write(tmp_path, BASE.replace("lora_r: 8", "prompt_path: prompts.txt\n  image_size: 28")))
    (cfg, size, prompts), *others = Pairs.seen
    assert (cfg.name, size, prompts, others) == ("faces", 28, ("<Img><ImageHere></Img> Look.",), [])


def test_an_empty_section_of_data_is_for_inference_only(tmp_path: Path) -> None:
    text = "model: {arch: toy, llama_model: llm_dir}\ndatasets:\nrun:\n"
    assert load_config(write(tmp_path, text), check_data=False).datasets == {}
    with pytest.raises(ConfigError, match="face.yaml:2: datasets: is empty; name a data set, known: "):
        load_config(write(tmp_path, text))


def test_evaluation_sections_are_kept_as_written(tmp_path: Path) -> None:
    text = BASE + "evaluation_datasets:\n  gqa: {eval_file_path: /e, batch_size: 10, any: [1, {b: c}]}\n"
    expected = {"gqa": {"eval_file_path": "/e", "batch_size": 10, "any": [1, {"b": "c"}]}}
    assert load_config(write(tmp_path, text)).evaluation_datasets == expected


def test_numbers_and_dates_are_read_as_people_mean_them(tmp_path: Path) -> None:
    cfg = load_config(
        write(tmp_path, BASE + "  init_lr: 1e-5\n  min_lr: 1E-6\n  warmup_lr: 2\n  job_name: 2024-05-01\n")
    )
    run = cfg.run
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.job_name) == (1e-5, 1e-6, 2.0, "2024-05-01")


def test_anchors_and_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = BASE.replace("  faces:", "  known: &k {batch_size: 7, sample_ratio: 1}\n  faces:\n    <<: *k")
    faces = load_config(write(tmp_path, text)).datasets["faces"]
    assert (faces.batch_size, faces.sample_ratio) == (2, 1.0)


HARD_TEXTS = [
    "a: b",
    "l1\nl2",
    "1e-5",
    "1_0",
    "12:30",
    "0x1f",
    "~",
    "null",
    "on",
    "",
    "-",
    "?",
    "=",
    "<<",
    "2024-05-01",
]


def test_a_dumped_config_loads_back_equal(tmp_path: Path) -> None:
    dataset = f"  known: {{prompts: {json.dumps(HARD_TEXTS)}}}\n"
    text = BASE.replace("lora_r: 8", "vit_config: {a: [1, 2.5]}\n  prompt_template: '[INST] {} [/INST] '")
    text = text.replace("run:", f"{dataset}evaluation_datasets: {{gqa: {{n: 1}}}}\nrun:\n  amp: True\n  init_lr: 1e-5")
    cfg = load_config(write(tmp_path, text))
    assert cfg.datasets["known"].prompts == HARD_TEXTS
    assert load_config(write(tmp_path / "llm_dir", dump_config(cfg))) == cfg


@pytest.mark.parametrize(("written", "meant"), [(r"\${x} #", "${x} #"), (r"\\\${x}", r"\${x}"), (r"a\b", r"a\b")])
def test_an_escaped_reference_is_text_and_stays_text(tmp_path: Path, written: str, meant: str) -> None:
    cfg = load_config(write(tmp_path, BASE.replace("lora_r: 8", f"end_sym: '{written}'")))
    assert cfg.model.end_sym == meant
    assert load_config(write(tmp_path / "llm_dir", dump_config(cfg))) == cfg


def test_the_package_moves_without_breaking_a_dumped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "elsewhere" / "minigpt4"
    package.mkdir(parents=True)
    (package / "look.txt").write_text("<Img><ImageHere></Img> Look.\n", encoding="utf-8")
    monkeypatch.setattr("minigpt4.common.config.PACKAGE_ROOT", package)
    monkeypatch.setattr("minigpt4.common.config.REPOSITORY_ROOT", package.parent)
    cfg = load_config(write(tmp_path, BASE.replace("lora_r: 8", "prompt_path: minigpt4/look.txt")))
    assert cfg.model.prompt_path == str(package / "look.txt")
    assert "prompt_path: minigpt4/look.txt\n" in dump_config(cfg)


def test_weights_that_moved_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    text = BASE.replace("llm_dir", "/gone/llm_dir").replace("lora_r: 8", "ckpt: /gone/faces.json")
    model = load_config(write(tmp_path, text)).model
    assert (model.llama_model, model.ckpt) == (str(tmp_path / "llm_dir"), str(tmp_path / "faces.json"))
    assert [record.getMessage().split(" not found")[0] for record in caplog.records] == [
        "face.yaml:3: model.llama_model: '/gone/llm_dir'",
        "face.yaml:4: model.ckpt: '/gone/faces.json'",
    ]


def test_a_plugin_beside_the_program_registers_its_names(tmp_path: Path) -> None:
    code = "from minigpt4.common.registry import registry\nregistry.register('format', 'mine')(len)\n"
    (tmp_path / "toy_plugin_formats.py").write_text(code, encoding="utf-8")
    text = BASE.replace("format: talk", "format: mine") + "  plugins: [toy_plugin_formats]\n"
    assert load_config(write(tmp_path, text)).datasets["faces"].format == "mine"


def test_the_catalog_names_a_plugin_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MODULES", ())
    with pytest.raises(ConfigError, match="plugin 'no_such_plugin_xyz' cannot be imported: No module named"):
        catalog.load(["no_such_plugin_xyz"])


@pytest.mark.parametrize(("text", "sanity"), [("off", "off"), ("'off'", "off"), ("warn", "warn")])
def test_off_is_a_word_where_a_word_is_wanted(tmp_path: Path, text: str, sanity: str) -> None:
    assert load_config(write(tmp_path, BASE + f"  sanity: {text}\n")).run.sanity == sanity
    assert load_config(write(tmp_path, BASE), [f"run.sanity={text}"]).run.sanity == sanity


@pytest.mark.parametrize(("text", "value"), [("on", True), ("yes", True), ("False", False), ("off", False)])
def test_on_and_off_are_booleans_where_one_is_wanted(tmp_path: Path, text: str, value: bool) -> None:
    assert load_config(write(tmp_path, BASE + f"  evaluate: {text}\n")).run.evaluate is value
