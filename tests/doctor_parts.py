"""Data with one planted problem per check, and the configuration of a run over it."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.golden_cases import LLAMA, TINY_EVA

Record = dict[str, Any]


def picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Nine by eight blocks of random grey, scaled up: unlike any other seed's."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def bomb() -> bytes:
    """Head of a PNG of 40,000 x 40,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return start + struct.pack(">I", 1000) + b"IDAT" + bytes(1000)


def talk(number: int, image: str, question: str = "<image>\nWhat is it?", answer: str = "") -> Record:
    """A record in LLaVA's layout."""
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer or f"It is person {number}."}]
    return {"id": f"r{number}", "image": image, "conversations": said}


def lines(path: Path, records: list[Record]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_config(folder: Path, datasets: dict[str, Any], **model: Any) -> Path:
    """A tiny MiniGPT-v2 over ``datasets``; its language model has a tokenizer and no weights."""
    llm = folder / "llm"
    llm.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (llm / name).write_bytes((LLAMA / name).read_bytes())
    settings = {
        "arch": "minigpt_v2", "image_size": 56, "vit_model": "eva", "vit_config": TINY_EVA, "vit_weights": "random",
        "llama_model": str(llm), "lora_r": 4, "chat_template": True, "end_sym": "</s>", "max_txt_len": 60, **model,
    }  # fmt: skip
    path = folder / "run.yaml"
    content = {"model": settings, "datasets": datasets, "run": {"max_epoch": 1, "output_dir": str(folder / "output")}}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def block(ann_path: str, root: Path | str, **more: Any) -> dict[str, Any]:
    return {"build_info": {"ann_path": ann_path, "image_path": str(root)}, "format": "conversation", **more}


def clean_set(folder: Path, count: int = 6) -> dict[str, Any]:
    """A data set without a problem."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.jpg")
    return block(lines(folder / "good.jsonl", [talk(number, f"{number}.jpg") for number in range(count)]), folder)


def planted_pictures(folder: Path) -> dict[str, str]:
    """Check -> name of a picture file that has its problem."""
    jpeg = folder / "whole.jpg"
    picture(50, (300, 300)).save(jpeg)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture", encoding="utf-8")
    (folder / "cut.jpg").write_bytes(jpeg.read_bytes()[:-400])
    (folder / "bomb.png").write_bytes(bomb())
    Image.new("1", (8100, 8000)).save(folder / "huge.png")
    picture(51, (20, 20)).save(folder / "tiny.png")
    picture(52, (600, 100)).save(folder / "long.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(53).save(folder / "turned.jpg", exif=exif)
    picture(54).convert("RGBA").save(folder / "alpha.png")
    picture(55).quantize(16).save(folder / "palette.png")
    picture(56).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(96 * 80, dtype=np.uint16).reshape(80, 96)).save(folder / "deep.png")
    return {
        "image-missing": "nowhere.jpg", "image-empty": "empty.jpg", "image-unreadable": "text.jpg",
        "image-truncated": "cut.jpg", "image-bomb": "bomb.png", "image-huge": "huge.png", "image-tiny": "tiny.png",
        "image-aspect": "long.png", "image-rotated": "turned.jpg", "image-alpha": "alpha.png",
        "image-palette": "palette.png", "image-cmyk": "cmyk.jpg", "image-16bit": "deep.png",
    }  # fmt: skip


def planted_texts() -> dict[str, Record]:
    """Check -> changes to a record that plant its problem."""
    long = "a word and another " * 40
    empty = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": " "}]
    return {
        "record-unusable": {"conversations": [{"from": "human", "value": "<image>\nWho?"}]},
        "image-tags": {"image": "", "conversations": talk(0, "")["conversations"]},
        "answer-empty": {"conversations": empty},
        "answer-refusal": {"answer": "I'm sorry, but I can't identify the person."},
        "answer-cut": {"answer": long},
        "prompt-cut": {"question": f"<image>\n{long}"},
        "placeholder": {"question": "<image>\nWhat is the <EMOTION> here?"},
        "special-token": {"answer": "It ends </s> here."},
        "control-characters": {"answer": "one\x07two"},
        "mojibake": {"answer": "a cafÃ© in Paris"},
        "box-order": {"answer": "at {<50><10><20><30>}"},
        "box-outside": {"answer": "at {<50><10><220><330>}"},
        "box-empty": {"answer": "at {<50><10><50><30>}"},
    }


def planted(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    """A conversation set with every planted record; check -> (place, id)."""
    folder.mkdir(exist_ok=True)
    records = [talk(0, "0.png"), talk(1, "1.png")]
    places: dict[str, tuple[str, str]] = {}

    def add(check: str, record: Record) -> None:
        record["id"] = f"id-{check}"
        records.append(record)
        places[check] = (f"line {len(records)}", record["id"])

    for check, name in planted_pictures(folder).items():
        add(check, talk(len(records), name))
    for check, changes in planted_texts().items():
        texts = {key: changes[key] for key in ("question", "answer") if key in changes}
        rest = {key: changes[key] for key in changes if key not in texts}
        add(check, {**talk(len(records), f"{len(records)}.png", **texts), **rest})
    add("record-duplicate", talk(0, "0.png"))
    records += [talk(90, "90.png", "<image>\nSmiling?", "Yes")]
    add("answers-conflict", talk(91, "90.png", "<image>\nSmiling?", "No."))
    for number in range(len(records)):
        picture(100 + number).save(folder / f"{number}.png")
    picture(99).save(folder / "90.png")
    return block(lines(folder / "planted.jsonl", records), folder), places
