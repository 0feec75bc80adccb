"""Made-up annotation files in the public formats of MiniGPT-v2's data sets, in the folders where users keep them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (640, 480)
COCO = (42, 43, 44)
"""Ids of the pictures of COCO."""


def dump(path: Path, content: Any) -> Path:
    """``content`` as JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def picture(path: Path, size: tuple[int, int] = SIZE) -> Path:
    """A picture of one colour; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 20, 200)).save(path)
    return path


def coco_name(number: int, year: str = "train2014") -> str:
    """``COCO_train2014_000000000042.jpg``."""
    return f"COCO_{year}_{number:012d}.jpg"


def refs(folder: Path, split_by: str) -> None:
    """Two training objects and one of another split, as Python 2 pickled them."""
    sentences = [{"sent_id": n, "raw": raw, "sent": "never read"} for n, raw in enumerate(("Tall red mug.", "The MUG"))]
    content = [
        {"ref_id": n, "ann_id": 900 + n, "image_id": 42 + n, "split": split, "sentences": sentences, "category_id": 1}
        for n, split in enumerate(("train", "train", "val"))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(content, protocol=2))
    boxes = ([3.24, 159.31, 156.4, 312.81], [600, 10, 80, 20], [0, 0, 64, 48])
    dump(
        folder / "instances.json",
        {
            "images": [{"id": number, "width": SIZE[0], "height": SIZE[1]} for number in COCO],
            "annotations": [{"id": 900 + n, "image_id": 42 + n, "bbox": box} for n, box in enumerate(boxes)],
            "categories": [],
        },
    )


def visual_genome(root: Path) -> None:
    """Two pictures, one of them without regions; regions that are large, small and half outside."""
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/{}.jpg"
    size = {"width": 800, "height": 600, "coco_id": None, "flickr_id": None}
    dump(root / "image_data.json", [{"image_id": n, "url": url.format(n), **size} for n in (1, 2)])
    picture(root / "VG_100K_2" / "1.jpg", (800, 600))
    boxes = [(300, 80, 60, 90), (0, 0, 128, 128), (-8, 590, 100, 20), (900, 10, 5, 5)]
    regions = [
        {"region_id": 10 + n, "image_id": 1, "phrase": "Blue door handle", "x": x, "y": y, "width": w, "height": h}
        for n, (x, y, w, h) in enumerate(boxes)
    ]
    dump(root / "region_descriptions.json", [{"id": 2, "regions": []}, {"id": 1, "regions": regions}])


def flickr(root: Path) -> None:
    """One picture in each of the three files."""
    picture(root / "images" / "1000042.jpg")
    one = {"image_id": "1000042"}
    said = "<p>A boy</p> {<10><12><55><99>} holds <p>a kite</p> {<50><2><80><30>} ."
    dump(root / "groundedcaption.json", [{**one, "grounded_caption": said}])
    dump(
        root / "captiontobbox.json", [{**one, "caption": "A Boy, a kite.", "output": "<p>A Boy</p> {<10><12><55><99>}"}]
    )
    boxes = "{<10><12><55><99>}<delim>{<60><12><90><99>}"
    dump(root / "phrasetobbox.json", [{**one, "phrase": "Two boys.", "bbox": boxes}])


def lavis(root: Path) -> None:
    """Captions and questions on COCO's pictures, in the shape of LAVIS."""
    image = f"train2014/{coco_name(42)}"
    captions = [
        {"caption": "A Woman reads.", "image": name, "image_id": "coco_42"} for name in (image, "val2014/x.jpg")
    ]
    dump(root / "coco_captions" / "annotations" / "coco_karpathy_train.json", captions)
    asked = {"question_id": 42001, "question": "What is on the Table?", "answer": ["Mug", "Mug", "cup"], "image": image}
    dump(root / "vqav2" / "vqa_train.json", [{**asked, "dataset": "vqa"}])
    dump(root / "vqav2" / "vqa_val.json", [{**asked, "image": f"val2014/{coco_name(43, 'val2014')}"}])
    dump(root / "okvqa" / "okvqa_train.json", [asked])
    official = {"split": "train", "image_id": 44, "question_id": "aB3", "question": "Why is the mug hot?"}
    official |= {"choices": ["a", "b"], "correct_choice_idx": 0, "direct_answers": ["Hot tea."], "rationales": []}
    dump(root / "aokvqa" / "aokvqa_v1p0_train.json", [official])
    question = {"question_id": "7", "image": "1000042.jpg", "question": "Is the sky dark?", "answer": "yes"}
    dump(root / "gqa" / "train_balanced_questions.json", [question])
    picture(root / "gqa" / "images" / "1000042.jpg")


def conversations(root: Path) -> None:
    """LLaVA's three files, the multi-task one and the text-only instructions."""
    talk = [{"from": "human", "value": "What is\nshown?\n<image>"}, {"from": "gpt", "value": "A mug.\nIt is red."}]
    for name in ("conversation_58k", "detail_23k", "complex_reasoning_77k"):
        dump(root / "llava" / f"{name}.json", [{"id": f"{42:012d}", "image": f"{42:012d}.jpg", "conversations": talk}])
    tasks = ("<image>\n[refer] the left cup", "{<12><40><30><66>}", "[vqa] what colour is it?", "blue")
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(tasks)]
    dump(root / "multitask_conversation" / "multitask_conversation.json", [{"id": f"{43:012d}", "conversations": said}])
    instance = {"instruction_with_input": "Rewrite: Hi", "input": "Hi", "constraints": None, "output": "Hello"}
    dump(
        root / "unnatural_instructions" / "filtered_unnatural_instruction.json",
        [{"instruction": "Rewrite", "instances": [instance]}],
    )


def data_folder(root: Path) -> Path:
    """Everything of MiniGPT-v2's third stage below ``root``."""
    images = root / "coco" / "images"
    for number in COCO:
        picture(images / "train" / coco_name(number))
    picture(images / "val2014" / coco_name(43, "val2014"))
    for name, split_by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        refs(root / "refcoco_annotations" / name, split_by)
    visual_genome(root / "visual_genome")
    flickr(root / "filtered_flickr")
    lavis(root)
    conversations(root)
    picture(root / "textcaps" / "train_images" / "0a1b.jpg")
    sign = {"image_id": "0a1b", "caption_str": "A sign that says OPEN.", "reference_strs": ["x"]}
    dump(root / "textcaps" / "TextCaps_0.1_train.json", {"dataset_name": "textcaps", "data": [sign]})
    book = {
        "imageURL": "http://x.org/ab12.gif",
        "questions": ["Who wrote it?", "What Title?"],
        "answers": ["J. Doe", "Birds"],
    }
    books = {f"00{n}": {**book, "title": "t", "genre": "Nature", "split": n} for n in (1, 2, 3)}
    dump(root / "ocrvqa" / "dataset.json", books)
    picture(root / "ocrvqa" / "images" / "001.jpg")
    return root
