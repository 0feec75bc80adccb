"""Pixels and text equal what published checkpoints were trained on."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minigpt4.processors.image
import minigpt4.processors.text  # noqa: F401  (registers the names)
from minigpt4.common.errors import ConfigError, DataError
from minigpt4.common.schema import ProcessorConfig
from minigpt4.processors.base import CLIP_MEAN, ImageSpec, make_image_processor, make_text_processor
from minigpt4.processors.image import Blip2ImageTrain

GOLDEN = Path(__file__).parent / "golden"
PIXELS = sorted((GOLDEN / "processors").glob("*.npy"))
CAPTIONS = json.loads((GOLDEN / "processors" / "blip_caption.json").read_text(encoding="utf-8"))["rows"]


def picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / "datasets" / "images" / name.replace("faces_", "faces/"))


@pytest.mark.parametrize("path", PIXELS, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["blip2_image_train", "blip2_image_eval", ""])
def test_pixels_equal_the_reference_bit_for_bit(path: Path, name: str) -> None:
    source, size = path.name.removesuffix(".train.npy").rsplit(".", 1)
    tensor = make_image_processor(ProcessorConfig(name=name), ImageSpec(int(size)))(picture(source))
    assert tensor.dtype.is_floating_point and tensor.is_contiguous()
    assert np.array_equal(tensor.numpy(), np.load(path))


def test_pixels_at_224_equal_the_reference_bit_for_bit() -> None:
    tensor = make_image_processor(ProcessorConfig(), ImageSpec(224))(picture("faces/a.png"))
    expected = "fc0776b95a2c2ad98c6db956724df9fbd0bea0336ae2634d98db7d33373c7110"
    assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == expected


def test_mean_and_std_come_from_yaml_then_from_the_model_then_from_clip() -> None:
    image = ImageSpec(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert make_image_processor(ProcessorConfig(mean=[0.1, 0.2, 0.3]), image).spec.mean == (0.1, 0.2, 0.3)
    assert make_image_processor(ProcessorConfig(), image).spec == image
    assert make_image_processor(ProcessorConfig(), ImageSpec(8, (), ())).spec.mean == CLIP_MEAN


def test_a_std_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="no zero"):
        make_image_processor(ProcessorConfig(std=[0.0, 1.0, 1.0]), ImageSpec(8))


@pytest.mark.parametrize("row", CAPTIONS, ids=lambda row: repr(row["text"])[:30])
def test_captions_are_cleaned_as_in_the_reference(row: dict[str, str]) -> None:
    plain = make_text_processor(ProcessorConfig(name="blip_caption"))
    prompted = make_text_processor(ProcessorConfig(name="blip_caption", prompt="a photo of ", max_words=3))
    assert plain(row["text"]) == row["out"]
    assert prompted(row["text"]) == row["out_prompt_max3"]
    assert plain(row["out"]) == row["out"]


def test_without_a_name_text_stays_as_it_is() -> None:
    assert make_text_processor(ProcessorConfig())(" A (b).\n") == " A (b).\n"


def test_a_processor_of_the_other_kind_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="vis_processor: 'identity' .*blip2_image_eval, blip2_image_train"):
        make_image_processor(ProcessorConfig(name="identity"), ImageSpec(8))
    with pytest.raises(ConfigError, match="text_processor: .*blip_caption, identity"):
        make_text_processor(ProcessorConfig(name="blip2_image_eval"))


def test_processors_travel_to_loader_workers() -> None:
    processor = make_image_processor(ProcessorConfig(), ImageSpec(8))
    assert pickle.loads(pickle.dumps(processor)).spec == processor.spec


def photograph(side: int = 512) -> bytes:
    from skimage import data

    stream = io.BytesIO()
    picture: Any = data.astronaut()
    Image.fromarray(picture).resize((side, side - 100)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize("size", [224, 448])
def test_the_fast_backend_is_one_level_off_at_most(size: int) -> None:
    exact = Blip2ImageTrain(ProcessorConfig(), ImageSpec(size, (0.0,) * 3, (1.0,) * 3))
    content = photograph()
    difference = (exact.fast()(Image.open(io.BytesIO(content))) - exact(Image.open(io.BytesIO(content)))).abs() * 255
    assert difference.max() < 1.01 and difference.mean() < 0.05


def test_the_fast_backend_leaves_other_formats_to_pillow() -> None:
    exact = Blip2ImageTrain(ProcessorConfig(), ImageSpec(56))
    for mode, ending in (("RGBA", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")):
        stream = io.BytesIO()
        Image.open(io.BytesIO(photograph(200))).convert(mode).save(stream, ending)
        stream.seek(0)
        assert torch.equal(exact.fast()(Image.open(io.BytesIO(stream.getvalue()))), exact(Image.open(stream)))


def test_the_fast_backend_tells_a_cut_file() -> None:
    fast = Blip2ImageTrain(ProcessorConfig(), ImageSpec(56)).fast()
    with pytest.raises(DataError, match="cannot be read"):
        fast(Image.open(io.BytesIO(photograph()[:5000])))
