"""`minigpt4 doctor`: every planted problem is found with its place, and data without one is left in peace."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from minigpt4 import cli
from minigpt4.tools.doctor.checks import CHECKS
from tests.data_parts import png, tar_file
from tests.doctor_parts import (
    block,
    clean_set,
    lines,
    picture,
    planted,
    planted_pictures,
    planted_texts,
    talk,
    write_config,
)

Found = dict[str, dict[str, dict[str, Any]]]


def doctor(config: Path, *flags: str) -> tuple[int, Found]:
    """Exit code, and problems by data set and check."""
    out = config.parent / "found.json"
    code = cli.main(["doctor", "--cfg-path", str(config), "--json", str(out), "--workers", "1", *flags])
    content = json.loads(out.read_text(encoding="utf-8"))
    return code, {item["title"]: {one["check"]: one for one in item["problems"]} for item in content["data_sets"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Found, dict[str, tuple[str, str]], Path]:
    """One run over the planted set, with its reports."""
    folder = tmp_path_factory.mktemp("planted")
    dataset, places = planted(folder / "data")
    config = write_config(folder, {"talk": dataset}, max_context_len=60)
    code, found = doctor(config, "--report", str(folder / "report.html"), "--clean", str(folder / "clean"))
    return code, found, places, folder


PLANTED = [*planted_texts(), "record-duplicate", "answers-conflict"]
PICTURES = [
    "image-missing", "image-empty", "image-unreadable", "image-truncated", "image-bomb", "image-huge", "image-tiny",
    "image-aspect", "image-rotated", "image-alpha", "image-palette", "image-cmyk", "image-16bit",
]  # fmt: skip


@pytest.mark.parametrize("check", PICTURES + PLANTED)
def test_a_planted_problem_is_found_once_with_its_place(check: str, run: Any) -> None:
    _, found, places, _ = run
    assert check in found["talk"], sorted(found["talk"])
    where, name = places[check]
    problem = found["talk"][check]
    assert problem["count"] == 1, problem
    assert problem["examples"][0]["where"].endswith(f"planted.jsonl, {where}")
    assert problem["examples"][0]["id"] == name


def test_nothing_else_is_found_in_the_planted_set(run: Any) -> None:
    code, found, places, _ = run
    assert code == 1
    assert set(found["talk"]) == set(places)


def test_a_clean_set_is_left_in_peace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(write_config(tmp_path, {"talk": clean_set(tmp_path / "data")}))
    assert code == 0 and found == {"talk": {}}
    shown = capsys.readouterr().out
    assert "talk: 6 records" in shown and "nothing to complain about" in shown
    assert "6 records: 0 errors, 0 warnings, 0 notes; 0 records with an error" in shown


def test_several_processes_find_the_same(run: Any) -> None:
    _, found, _, folder = run
    config = folder / "run.yaml"
    out = folder / "parallel.json"
    assert cli.main(["doctor", "--cfg-path", str(config), "--json", str(out), "--workers", "2"]) == 1
    (result,) = json.loads(out.read_text(encoding="utf-8"))["data_sets"]
    assert {one["check"]: one for one in result["problems"]} == found["talk"]


def test_cleaned_records_train_without_errors(run: Any, tmp_path: Path) -> None:
    _, found, places, folder = run
    path = folder / "clean" / "talk" / "clean.jsonl"
    kept = {json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()}
    wrong = {name for check, (_, name) in places.items() if CHECKS[check].severity == "error"}
    whole = {json.loads(line)["id"] for line in (folder / "data" / "planted.jsonl").read_text().splitlines()}
    assert kept == whole - wrong
    option = f"datasets.talk.build_info.ann_path={path}"
    code, again = doctor(folder / "run.yaml", "--options", option)
    assert code == 0
    assert all(problem["severity"] != "error" for problem in again["talk"].values())
    assert cli.train_command(["--cfg-path", str(folder / "run.yaml"), "--dry-run", "--options", option]) == 0


def test_a_cleaned_set_keeps_what_it_holds_out(tmp_path: Path) -> None:
    dataset = {**clean_set(tmp_path / "data", 20), "val": {"fraction": 0.3}}
    (tmp_path / "data" / "3.jpg").write_bytes(b"")
    config = write_config(tmp_path, {"talk": dataset})
    assert doctor(config, "--clean", str(tmp_path / "clean"))[0] == 1
    path = tmp_path / "clean" / "talk" / "clean.jsonl"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 19
    assert not (path.parent / "clean_val.jsonl").exists()
    code, found = doctor(config, "--options", f"datasets.talk.build_info.ann_path={path}")
    assert code == 0 and set(found) == {"talk", "talk (val)"}


def test_a_layout_of_its_own_gets_a_block_to_use_the_cleaned_file_with(tmp_path: Path) -> None:
    storage = tmp_path / "align"
    (storage / "image").mkdir(parents=True)
    for number in range(3):
        picture(number).save(storage / "image" / f"{number}.jpg")
    (storage / "image" / "1.jpg").write_bytes(b"")
    records = [{"image_id": str(number), "caption": f"person {number}"} for number in range(3)]
    (storage / "filter_cap.json").write_text(json.dumps({"annotations": records}), encoding="utf-8")
    config = write_config(tmp_path, {"cc_sbu_align": {"build_info": {"storage": str(storage)}, "batch_size": 2}})
    assert doctor(config, "--clean", str(tmp_path / "clean"))[0] == 1
    block_file = tmp_path / "clean" / "cc_sbu_align" / "block.yaml"
    cleaned = yaml.safe_load(block_file.read_text(encoding="utf-8"))["datasets"]
    code, found = doctor(write_config(tmp_path, cleaned))
    assert code == 0 and found == {"cc_sbu_align_clean": {}}
    assert cleaned["cc_sbu_align_clean"]["batch_size"] == 2


def test_boxes_in_pixels_are_held_against_their_picture(tmp_path: Path) -> None:
    picture(1, (100, 50)).save(tmp_path / "a.png")
    boxes = [[10, 10, 30, 20], [10, 10, -5, 20], [200, 10, 20, 20], [90, 10, 12, 20]]
    records = [{"id": i, "image": "a.png", "phrase": f"cup {i}", "box": box} for i, box in enumerate(boxes)]
    dataset = {**block(lines(tmp_path / "boxes.jsonl", records), tmp_path), "format": "refer"}
    code, found = doctor(write_config(tmp_path, {"cups": dataset}))
    assert code == 1
    assert {check: one["examples"][0]["id"] for check, one in found["cups"].items()} == {
        "box-order": "1",
        "box-outside": "2",
        "box-clamped": "3",
    }


def test_emotions_of_a_mapping_are_counted_and_a_missing_one_is_no_crash(tmp_path: Path) -> None:
    texts = {"0.png": "Happy, a wide smile", "1.png": ", no emotion", "2.png": "", "3.png": "Happy"}
    for number, name in enumerate(texts):
        picture(number).save(tmp_path / name)
    (tmp_path / "emotions.json").write_text(json.dumps(texts), encoding="utf-8")
    dataset = {**block(str(tmp_path / "emotions.json"), tmp_path), "format": "auto"}
    dataset["build_info"]["label_ratio"] = 1.0
    code, found = doctor(write_config(tmp_path, {"faces": dataset}), "--clean", str(tmp_path / "clean"))
    assert code == 1
    assert found["faces"]["record-unusable"]["examples"][0]["where"].endswith("entry 1")
    assert found["faces"]["answer-empty"]["examples"][0]["where"].endswith("entry 2")
    content = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert content["data_sets"][0]["histograms"]["emotions"] == {"Happy": 2, "(none)": 2}
    usage = next(note for note in content["notes"] if note.startswith("use it: --options "))
    assert doctor(tmp_path / "run.yaml", "--options", *usage.removeprefix("use it: --options ").split())[0] == 0


def test_a_prompt_without_its_picture_is_told(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    record = {"id": "x", "image": "a.png", "question": "What is it?", "answer": "a cup"}
    dataset = {**block(lines(tmp_path / "a.jsonl", [record]), tmp_path), "format": "text"}
    code, found = doctor(write_config(tmp_path, {"cups": dataset}))
    assert code == 0 and list(found["cups"]) == ["image-unused"]


def test_pictures_of_training_in_validation_are_found_under_other_names(tmp_path: Path) -> None:
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    picture(2).save(tmp_path / "pressed.jpg", quality=60)
    train = lines(tmp_path / "train.jsonl", [talk(number, f"{number}.png") for number in range(3)])
    held_out = [talk(10, "copy.png"), talk(11, "pressed.jpg"), talk(12, "3.png")]
    val = {"ann_path": lines(tmp_path / "val.jsonl", held_out)}
    config = write_config(tmp_path, {"talk": block(train, tmp_path, val=val)})
    code, found = doctor(config, "--clean", str(tmp_path / "clean"))
    assert code == 1
    assert {check: one["examples"][0]["id"] for check, one in found["talk"].items()} == {
        "leak-same": "r1",
        "leak-similar": "r2",
    }
    assert "val.jsonl, line 1" in found["talk"]["leak-same"]["examples"][0]["detail"]
    assert found["talk (val)"] == {}
    kept = (tmp_path / "clean" / "talk" / "clean.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in kept] == ["r0", "r2"]
    assert len((tmp_path / "clean" / "talk" / "clean_val.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert doctor(config, "--no-leaks")[0] == 0


def test_texts_of_training_in_validation_are_found(tmp_path: Path) -> None:
    records = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(4)]
    val = {"ann_path": lines(tmp_path / "val.jsonl", [records[2], {"question": "9?", "answer": "nine"}])}
    dataset = {**block(lines(tmp_path / "train.jsonl", records), ""), "format": "text", "val": val}
    code, found = doctor(write_config(tmp_path, {"sums": dataset}))
    assert code == 1 and found["sums"]["leak-record"]["examples"][0]["where"].endswith("train.jsonl, line 3")


def test_an_unknown_section_names_the_nearest_and_the_others_are_examined(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    ann = tmp_path / "sections.json"
    ann.write_text(json.dumps({"Posture": [talk(1, "a.png")], "Gender": [talk(2, "gone.png")]}), encoding="utf-8")
    dataset = {**block(str(ann), tmp_path), "builder": "FaceGPT4Vision"}
    dataset["build_info"]["subsets_prompts"] = ["Postures", "Gender"]
    code, found = doctor(write_config(tmp_path, {"faces": dataset}))
    assert code == 1
    assert "'Postures' (did you mean 'Posture'?)" in found["faces"]["section-unknown"]["examples"][0]["detail"]
    assert found["faces"]["image-missing"]["examples"][0]["where"].endswith("section 'Gender', record 0")


def test_a_broken_annotation_file_does_not_hide_the_other_sets(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"id": 1}\n{"id": ', encoding="utf-8")
    sets = {"broken": block(str(tmp_path / "broken.jsonl"), ""), "talk": clean_set(tmp_path / "data")}
    code, found = doctor(write_config(tmp_path, sets))
    assert code == 1 and found["talk"] == {}
    assert "line 2: not valid JSON" in found["broken"]["annotations"]["examples"][0]["detail"]


def test_tar_shards_are_looked_into(tmp_path: Path) -> None:
    good, broken = json.dumps({"caption": "a red square"}), json.dumps({"caption": "I cannot help with that."})
    members = {"1.jpg": png(10), "1.json": good.encode(), "2.jpg": png(10)[:-30], "2.json": broken.encode()}
    tar_file(tmp_path / "00000.tar", members)
    shards = {"builder": "shards", "format": "caption", "build_info": {"storage": str(tmp_path / "00000.tar")}}
    code, found = doctor(write_config(tmp_path, {"squares": shards}), "--clean", str(tmp_path / "clean"))
    assert code == 1
    assert found["squares"]["image-truncated"]["examples"][0]["where"] == "00000.tar, sample 2"
    assert found["squares"]["answer-refusal"]["count"] == 1
    assert found["squares"]["image-tiny"]["count"] == 2
    assert "record-duplicate" not in found["squares"]


def test_a_sample_is_spread_evenly_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = clean_set(tmp_path / "data", 10)
    (tmp_path / "data" / "5.jpg").write_bytes(b"")
    config = write_config(tmp_path, {"talk": dataset})
    code, found = doctor(config, "--sample", "2")
    assert code == 1 and found["talk"]["image-empty"]["examples"][0]["id"] == "r5"
    assert "talk: 10 records, 2 of them looked at, spread evenly" in capsys.readouterr().out


def test_missing_weights_are_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        tmp_path, {"talk": clean_set(tmp_path / "data")}, llama_model="weights/none", vit_weights="gone.pth"
    )
    assert doctor(config)[0] == 0
    assert "'weights/none' is not on this machine: lengths are not checked" in capsys.readouterr().out


def test_mistakes_of_the_file_end_with_2_and_name_every_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"one": block("path/to/faces.json", ""), "two": block(str(tmp_path / "gone.json"), tmp_path / "gone")}
    assert cli.main(["doctor", "--cfg-path", str(write_config(tmp_path, sets))]) == 2
    shown = capsys.readouterr().err
    assert "datasets.one: build_info.ann_path: found the placeholder" in shown
    assert "datasets.two: 'gone.json' not found" in shown or "gone.json' not found" in shown


def test_clean_needs_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--cfg-path", "run.yaml", "--clean", str(tmp_path), "--sample", "3"])
    assert end.value.code == 2 and "--clean needs every record" in capsys.readouterr().err


def test_the_report_is_one_file_with_pictures_and_escaped_text(run: Any) -> None:
    page = (run[3] / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("data:image/jpeg;base64,") > 10
    assert "&lt;EMOTION&gt;" in page and "<EMOTION>" not in page
    assert "<script" not in page and "http:" not in page and "https:" not in page
    assert all(f"(<code>{check}</code>)" in page for check in run[2])


def test_every_check_of_a_record_is_planted_somewhere(tmp_path: Path) -> None:
    elsewhere = {
        "annotations", "section-unknown", "leak-same", "leak-record", "leak-similar", "box-clamped", "image-unused",
        "not-examined",
    }  # fmt: skip
    assert set(planted_pictures(tmp_path)) == set(PICTURES)
    assert set(CHECKS) == set(PICTURES) | set(PLANTED) | elsewhere
    assert Image.open(tmp_path / "whole.jpg").size == (300, 300)


def test_the_configuration_of_the_quickstart_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(__file__).resolve().parent.parent / "train_configs" / "quickstart_face.yaml"
    sections = yaml.safe_load(config.read_text(encoding="utf-8"))["datasets"]["gpt4visionface_detail"]["build_info"]
    data = tmp_path / "data"
    for folder in ("sharegpt", "facegpt4vision"):
        (data / folder).mkdir(parents=True)
    picture(1).save(data / "a.png")
    (data / "sharegpt" / "sharegpt_faces.json").write_text(json.dumps([talk(1, "a.png")]), encoding="utf-8")
    by_section = {name: [talk(2, "a.png", f"<image>\n{name}?")] for name in sections["subsets_prompts"]}
    (data / "facegpt4vision" / "by_section.json").write_text(json.dumps(by_section), encoding="utf-8")
    monkeypatch.setenv("QUICKSTART", str(tmp_path))
    out = tmp_path / "found.json"
    clean = tmp_path / "clean"
    assert cli.main(["doctor", "--cfg-path", str(config), "--json", str(out), "--clean", str(clean)]) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert "lengths" not in str(content["notes"])  # the language model's folder is part of the repository
    assert [item["looked_at"] for item in content["data_sets"]] == [1, 7]
    assert content["data_sets"][1]["histograms"]["sections"]["Posture"] == 1
    again = [note.removeprefix("use it: --options ") for note in content["notes"] if note.startswith("use it: ")]
    assert [option.rpartition("/")[2] for option in again] == ["clean.jsonl", "clean.json"]
    assert cli.main(["doctor", "--cfg-path", str(config), "--json", str(out), "--options", *again]) == 0
    assert [item["looked_at"] for item in json.loads(out.read_text(encoding="utf-8"))["data_sets"]] == [1, 7]


def test_messages_and_tables_are_read_as_training_reads_them(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"image": {"bytes": png(7), "path": "a.png"}, "question": "Who?", "answer": answer} for answer in ("I", "Me")
    ]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[0]]), tmp_path / "faces.parquet")
    picture(1).save(tmp_path / "a.png")
    said = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Who?"}]}]
    answers = ["I'm sorry, but I can't say.", " "]
    talks = [{"id": a, "messages": [*said, {"role": "assistant", "content": a}]} for a in answers]
    sets = {
        "table": {"format": "vqa", "build_info": {"ann_path": str(tmp_path / "faces.parquet")}},
        "talks": {**block(lines(tmp_path / "talks.jsonl", talks), tmp_path), "format": "messages"},
    }
    code, found = doctor(write_config(tmp_path, sets), "--clean", str(tmp_path / "clean"))
    assert code == 1
    assert set(found["table"]) == {"image-tiny", "answers-conflict", "record-duplicate"}
    assert set(found["talks"]) == {"answer-refusal", "answer-empty"}
    assert (tmp_path / "clean" / "talks" / "clean.jsonl").read_text(encoding="utf-8").count("\n") == 1
    assert not (tmp_path / "clean" / "table").exists()


def test_what_is_examined_does_not_depend_on_how_a_worker_starts(tmp_path: Path) -> None:
    from minigpt4 import catalog
    from minigpt4.common.config import load_config
    from minigpt4.tools.doctor.examine import Examiner
    from minigpt4.tools.doctor.opening import Wishes, find_encoder, open_splits

    catalog.load()
    dataset, _ = planted(tmp_path / "data")
    cfg = load_config(write_config(tmp_path, {"talk": dataset}), check_data=False, check_weights=False)
    (split,) = open_splits(cfg, Wishes()).splits
    here = Examiner(split, find_encoder(cfg)[0], seed=1)
    there: Examiner = pickle.loads(pickle.dumps(here))  # as a spawned worker receives it
    assert [there.examine(place) for place in range(20)] == [here.examine(place) for place in range(20)]


def test_a_stream_is_noted_and_not_examined(tmp_path: Path) -> None:
    tar_file(tmp_path / "0.tar", {"a.jpg": png(9), "a.txt": b"a wall"})
    info = {"storage": f"pipe:cat {tmp_path}/0.tar", "samples": 1_000_000}
    config = write_config(tmp_path, {"far": {"builder": "shards", "build_info": info, "format": "caption"}})
    out = tmp_path / "found.json"
    assert cli.main(["doctor", "--cfg-path", str(config), "--json", str(out)]) == 0
    assert "a stream is read in training only" in out.read_text(encoding="utf-8")
