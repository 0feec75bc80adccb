"""Subsets about faces: records are copied unchanged, gates are counted, overlaps obey set arithmetic."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "dataset"))

import face_gates  # noqa: E402
import make_face_subset  # noqa: E402
import subset_overlap  # noqa: E402

GATE = face_gates.read_words(face_gates.DEFAULT_WORDS)
CAPTIONS = {
    "coco/train2017/1.jpg": "A young woman smiles at the camera.",
    "coco/train2017/2.jpg": "A man stands by a clock; the clock face is white.",
    "sam/images/sa_3.jpg": "A red bus near a pier.",
    "wikiart/images/4.jpg": "A statue of a man with a calm expression.",
    "sam/images/sa_5.jpg": "A boy with blue eyes.",
}
"""The fake detector sees a face in pictures whose red is above 100: 1, 3 and 5; the one in 5 is small."""
REDS = (200, 50, 200, 50, 150)


def fake(image: Image.Image) -> list[tuple[float, ...]]:
    red: Any = image.convert("RGB").getpixel((0, 0))
    side = 20 if red[0] == 150 else 60
    return [(5, 5, side, side, 0.95), (0, 0, 50, 50, 0.3)] if red[0] > 100 else []


def record(image: str, caption: str, question: str = "Describe.\n<image>") -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"id": image.rpartition("/")[2], "image": image, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Annotations in a spelling of their own, and a picture per record; that of wikiart lies below data/."""
    for name, red in zip(CAPTIONS, REDS, strict=True):
        path = tmp_path / "Images" / ("data/" + name if name.startswith("wikiart") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (160, 120), (red, 0, 0)).save(path, "PNG")
    records = [json.dumps(record(*item)) for item in CAPTIONS.items()]
    records[4] = records[4].replace('"id": "sa_5.jpg"', '"id":1.50e1 , "note":"caf\\u00e9 \\/",\r\n"x":"é"')
    (tmp_path / "all.json").write_bytes(("[" + ",\n  ".join(records) + "]").encode())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_faces.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\nfrom tests.test_face_subset import fake\n"
    )
    return tmp_path


def run(folder: Path, *options: str) -> tuple[list[Any], dict[str, Any]]:
    make_face_subset.main([str(folder / "all.json"), "--out", str(folder / "out.json"), *options])
    return json.loads((folder / "out.json").read_text()), json.loads((folder / "out.json.stats.json").read_text())


def images(records: list[Any]) -> list[str]:
    return [found["image"] for found in records]


DETECTOR = ("--images", "Images", "--detector", "my_faces:fake")


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("A man with a beard.", ""),
        ("The WOMAN'S eyes are closed", ""),
        ("A boy near a clock face.", "caption: no face word"),
        ("Two people facing the sea; wine glasses stand on a table", "caption: no face word"),
        ("A smiling mandrill", "caption: no person word"),
        ("A statue of a man, smiling", ""),
    ],
)
def test_a_caption_passes_with_a_person_and_a_face_as_whole_words(caption: str, reason: str) -> None:
    assert GATE(caption) == reason


def test_figures_are_left_out_on_demand() -> None:
    strict = face_gates.read_words(face_gates.DEFAULT_WORDS, drops_figures=True)
    assert strict("A statue of a man, smiling") == "caption: a figure or drawing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("man\n", "line 1: 'man' stands before"),
        ("[persn]\n", "line 1: group 'persn', allowed: person"),
        ("[person]\n/(/\n", "line 2: no regular expression"),
        ("[person]\nman\n", "group .face. is empty"),
    ],
)
def test_a_word_file_that_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(face_gates.DataError, match=message):
        face_gates.read_words(tmp_path / "words.txt")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("caption", [0, 3, 4]),
        ("detector", [0, 2]),
        ("both", [0]),
        ("either", [0, 2, 3, 4]),
    ],
)
def test_records_are_kept_by_one_gate_by_both_or_by_either(folder: Path, keep: str, kept: list[int]) -> None:
    found, stats = run(folder, *DETECTOR, "--keep", keep)
    assert images(found) == [list(CAPTIONS)[number] for number in kept]
    assert (stats["entries"], stats["kept"]) == (5, len(kept))
    assert sum(row["count"] for row in stats["rejected"].values()) == 5 - len(kept)


def test_records_are_copied_character_by_character(folder: Path) -> None:
    run(folder, "--keep", "caption")
    source, text = (folder / "all.json").read_bytes(), (folder / "out.json").read_bytes()
    own = text.decode().removeprefix("[\n").removesuffix("\n]\n").split(",\n{")
    assert len(own) == 3 and b'1.50e1 , "note":"caf\\u00e9 \\/",\r\n"x":"\xc3\xa9"' in text
    assert all(part.removeprefix("{").encode() in source for part in own)


def test_the_statistics_tell_gates_prefixes_reasons_and_inputs(folder: Path) -> None:
    _, stats = run(folder, *DETECTOR)
    table = {(row["caption"], row["detector"]): row["entries"] for row in stats["gates"]}
    assert table == {("passed", "passed"): 1, ("passed", "failed"): 2, ("failed", "passed"): 1, ("failed", "failed"): 1}
    assert stats["per prefix"]["sam/images"] == {"entries": 2, "kept": 0}
    assert stats["rejected"]["detector: faces too small or too unsure"] == {
        "count": 1,
        "example": "record 4, sam/images/sa_5.jpg",
    }
    assert stats["kept by number of faces"] == {"1": 1}
    assert stats["median area share of the largest face"] == pytest.approx(60 * 60 / (160 * 120))
    assert stats["detector"]["name"] == "my_faces:fake" and len(stats["inputs"]["annotations"]["sha256"]) == 64


def test_a_lazy_run_keeps_the_same_records_and_looks_at_fewer_pictures(folder: Path) -> None:
    found, stats = run(folder, *DETECTOR, "--lazy")
    assert images(found) == ["coco/train2017/1.jpg"]
    assert sum(row["entries"] for row in stats["gates"] if row["detector"] == "not run") == 2
    assert len((folder / "out.json.detections.jsonl").read_text().splitlines()) == 1 + 3


def test_a_stopped_run_goes_on_and_another_detector_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, *DETECTOR)
    cache = folder / "out.json.detections.jsonl"
    lines = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # stopped in the middle of the third picture
    looked: list[Path] = []
    detect = face_gates.detect
    monkeypatch.setattr(face_gates, "detect", lambda path, detector: looked.append(path) or detect(path, detector))
    found, _ = run(folder, *DETECTOR, "--force")
    assert images(found) == ["coco/train2017/1.jpg"] and len(looked) == 3
    assert len(cache.read_text().splitlines()) == 6
    with pytest.raises(SystemExit):
        run(folder, "--images", "Images", "--force")
    assert "made by another detector" in capsys.readouterr().out


def test_broken_and_missing_pictures_are_counted_by_name(folder: Path) -> None:
    (folder / "Images/coco/train2017/2.jpg").write_bytes(b"no picture")
    (folder / "Images/sam/images/sa_5.jpg").unlink()
    _, stats = run(folder, *DETECTOR, "--keep", "detector", "--threads", "2")
    assert stats["rejected"]["picture cannot be read"]["example"] == "record 1, coco/train2017/2.jpg"
    assert stats["rejected"]["picture not found"]["count"] == 1


def test_a_prefix_points_to_another_folder(folder: Path) -> None:
    (folder / "Images/coco/train2017").rename(folder / "elsewhere")
    found, _ = run(folder, *DETECTOR, "--prefix", "coco/train2017=elsewhere")
    assert images(found) == ["coco/train2017/1.jpg"]


def test_second_captions_are_chosen_by_the_paths_of_a_subset(folder: Path) -> None:
    (folder / "chosen.json").write_text(json.dumps([record("./sam\\images\\sa_3.jpg", "x")]))
    found, stats = run(folder, "--keys-from", "chosen.json")
    assert images(found) == ["sam/images/sa_3.jpg"]
    assert stats["rejected"]["its picture is not in --keys-from"]["count"] == 4


def test_a_repeated_question_about_a_picture_is_kept_once(folder: Path) -> None:
    twice = [record("a.jpg", "A man smiles."), record("a.jpg", "He smiles."), record("a.jpg", "A man smiles.", "Who?")]
    (folder / "all.json").write_text(json.dumps(twice))
    found, stats = run(folder, "--keep", "caption", "--dedupe")
    assert [item["conversations"][0]["value"] for item in found] == ["Describe.\n<image>", "Who?"]
    assert stats["rejected"]["caption: no person word"]["count"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detector", "nowhere:fake", "--images", "Images"], "No module named 'nowhere'"),
        (["--detector", "fake", "--images", "Images"], "allowed: haar or module:function"),
        (["--detector", "my_faces:fake", "--images", "Images/sam"], "--prefix"),
        (["--keep", "caption", "--words", "none.txt"], "none.txt: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(folder, *options)
    assert stop.value.code == 1 and message in capsys.readouterr().out
    assert not (folder / "out.json").exists() and not list(folder.glob(".out.json*"))


def test_no_record_left_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "all.json").write_text(json.dumps([record("a.jpg", "A bus.")]))
    with pytest.raises(SystemExit):
        run(folder, "--keep", "caption")
    assert "none of 1 records is kept; most often: caption: no person word" in capsys.readouterr().out


def test_the_cascades_see_the_face_of_a_photograph_and_none_in_a_cup(tmp_path: Path) -> None:
    detector, facts = face_gates.load_detector("haar", 8)
    for name in ("astronaut", "coffee"):
        picture: Any = getattr(data, name)()
        Image.fromarray(picture).resize((1536, 1536)).save(tmp_path / f"{name}.jpg")
    seen = face_gates.detect(tmp_path / "astronaut.jpg", detector)
    (face,) = face_gates.FaceRule().faces(seen)
    assert (seen.width, seen.height) == (1536, 1536)
    assert 450 < face.x < 650 and 130 < face.y < 300 and 200 < face.width < 360  # 177, 66, 95 in the 512 px original
    assert face_gates.detect(tmp_path / "coffee.jpg", detector).faces == ()
    assert facts["version"].startswith("opencv 4")


def entries(*keys: str) -> Counter[str]:
    return Counter(keys)


def test_more_entries_than_paths_can_lie_in_the_other_file() -> None:
    report = subset_overlap.compare(entries("a/b/1", "a/b/1", "a/b/2", "c/3"), entries("a/b/1", "a/b/2", "a/b/2"))
    assert report["A"] == {
        "entries": 4,
        "distinct paths": 3,
        "surplus entries": 1,
        "paths with several entries": 1,
    }
    assert report["paths in both"] == 2
    assert report["entries of A whose path is in B"] == 3 and report["entries of B whose path is in A"] == 3
    assert report["per prefix"]["c"] == {
        "entries of A": 1,
        "distinct paths of A": 1,
        "entries of B": 0,
        "distinct paths of B": 0,
        "paths in both": 0,
    }


def test_a_report_that_no_sets_allow_is_caught() -> None:
    report = subset_overlap.compare(entries("1", "2"), entries("2", "3"))
    subset_overlap.check(report)
    with pytest.raises(AssertionError):
        subset_overlap.check(report | {"paths in both": 3})
    with pytest.raises(AssertionError):
        subset_overlap.check(report | {"entries of A whose path is in B": 5})


def test_the_overlap_of_two_files_is_printed_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b.json").write_text(json.dumps([record("./coco/train2017/1.jpg", "x"), record("gone/9.jpg", "y")]))
    make_face_subset.main(["--overlap", "all.json", "b.json", "--images", "Images"])
    report = json.loads((folder / "all.overlap.json").read_text())
    assert report["paths in both"] == 1 and report["paths in either"] == 6
    assert report["missing images"]["B"] == {"count": 1, "examples": ["gone/9.jpg"]}
    assert "paths in both: 1" in capsys.readouterr().out


def test_a_file_that_is_no_list_of_records_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ('{"a": 1}', '[{"image": "x"}, 3]', '[{"image": "x"}'):
        (folder / "all.json").write_text(content)
        with pytest.raises(SystemExit):
            make_face_subset.main(["--overlap", "all.json", "all.json"])
        assert "all.json" in capsys.readouterr().out
