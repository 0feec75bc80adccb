"""Trains the small vision tower of the quickstart on drawn faces: timm's ``Eva`` in the layout of MiniGPT-4's ViT-g.

The heads below see what the language model will see: four raster neighbours side by side, through one linear map
shared by all positions. They are thrown away after training; only the tower is kept.
"""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import face_text as ft
import numpy as np
import torch
import torch.nn.functional as F
from draw_faces import draw_one, plan_scenes
from face_drawing import SIZE, Drawing, Scene
from numpy.typing import NDArray
from PIL import Image
from skimage import data as skimage_data
from textures import texture
from timm.models.eva import Eva
from torch import Tensor, nn

log = logging.getLogger(__name__)

MODEL_SIZE = 64
"""Side of the tower's input."""
VIT_CONFIG: dict[str, Any] = {
    "img_size": MODEL_SIZE,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 4.3637,
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HEADS = (*ft.ANSWERS, "people")
"""Attributes with a classifier; ``people`` is the count with zero."""
CLASSES = {**{kind: len(answers) for kind, answers in ft.ANSWERS.items()}, "people": 4}
PARTS = ("face", "eyes", "mouth", "glasses")
_COLOUR_HEADS = ("hair colour", "skin tone")
_ROUGH_HEADS = ("head pose", "number of people", "human or not", "people", "expression", "glasses", "beard")
"""What can still be asked of a grey, 25-pixel picture."""
_PHOTOGRAPHS = (
    "brick",
    "grass",
    "gravel",
    "coffee",
    "chelsea",
    "rocket",
    "moon",
    "coins",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
    "horse",
)


def build_tower() -> Eva:
    """EVA layout of BLIP-2: class token, no norm after the blocks, q and v biases."""
    return Eva(
        **VIT_CONFIG,
        num_classes=0,
        global_pool="",
        qkv_bias=True,
        qkv_fused=True,
        use_post_transformer_norm=False,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] -> float32, CLIP's mean and deviation."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


@dataclass
class Pool:
    """Pictures with their labels.

    images  uint8 [N, 64, 64, 3]
    labels  int8 [N, heads]; -1 = not asked
    boxes   float32 [N, parts, 4] in 0..1; NaN = none
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int8]
    boxes: NDArray[np.float32]


def labels_of(scene: Scene) -> list[int]:
    """Class per head, -1 where the question makes no sense."""
    facts = ft.answers_of(scene)
    labels = [ft.ANSWERS[kind].index(facts[kind]) if kind in facts else -1 for kind in ft.ANSWERS]
    return [*labels, len(scene.people)]


def _through_jpeg(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92)
    return Image.open(stream).convert("RGB")


def _shrink(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.resize((MODEL_SIZE, MODEL_SIZE), Image.Resampling.BICUBIC))


def _grey_25(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Grey, 25 pixels wide, contrast changed, and back up: how small grey photographs look after resizing."""
    grey = image.convert("L").resize((25, 25), Image.Resampling.BILINEAR)
    pixels = np.asarray(grey).astype(np.float32)
    pixels = (pixels - pixels.mean()) * rng.uniform(0.4, 1.3) + rng.uniform(50, 190)
    across = np.linspace(-1, 1, 25, dtype=np.float32)
    pixels += (
        across[None, :] * rng.uniform(-40, 40) + across[:, None] * rng.uniform(-25, 25) + rng.normal(0, 3, (25, 25))
    )
    grey = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


def _close_crop(drawing: Drawing, rng: np.random.Generator) -> Image.Image:
    """A square from the brows to the chin, as face detectors cut it."""
    x1, y1, x2, y2 = drawing.boxes[0]["face"]
    side = (x2 - x1) * rng.uniform(0.72, 1.15)
    x, y = (x1 + x2) / 2 + rng.uniform(-0.08, 0.08) * side, y1 * 0.42 + y2 * 0.58 + rng.uniform(-0.08, 0.08) * side
    box = (int(x - side / 2), int(y - side / 2), int(x + side / 2), int(y + side / 2))
    return drawing.image.crop(box)


def _photo_crop(photos: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    """A piece of a photograph without people, sometimes tilted over black as crops near a border are."""
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.uniform(0.06, 0.5) * min(photo.size))
    x, y = int(rng.integers(photo.width - side)), int(rng.integers(photo.height - side))
    piece = photo.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return _tilted(piece, rng) if rng.random() < 0.4 else piece


def _tilted(piece: Image.Image, rng: np.random.Generator) -> Image.Image:
    shift = rng.uniform(-0.7, 0.7, 2) * SIZE
    return piece.rotate(float(rng.uniform(-25, 25)), translate=(int(shift[0]), int(shift[1])), fillcolor=(0, 0, 0))


def _extra_picture(
    drawing: Drawing, scene: Scene, photos: Sequence[Image.Image], rng: np.random.Generator
) -> tuple[Image.Image, list[int]]:
    """A grey or photographic variant, and its labels."""
    labels = labels_of(scene)
    if len(scene.people) == 1 and rng.random() < 0.62:
        picture = _close_crop(drawing, rng)
        keep = [label if head in _ROUGH_HEADS else -1 for head, label in zip(HEADS, labels, strict=True)]
        return _grey_25(picture, rng), keep
    nobody = labels_of(Scene(()))
    kind = rng.random()
    if kind < 0.6:
        picture = _photo_crop(photos, rng)
    elif kind < 0.8 or scene.people:
        picture = texture(rng, SIZE, float(rng.uniform(0.2, 1.5)))
    else:
        picture = drawing.image
    picture = _tilted(picture, rng) if rng.random() < 0.3 else picture
    return (_grey_25(picture, rng) if rng.random() < 0.8 else picture), nobody


def _draw_part(job: tuple[int, list[tuple[int, Scene]], float]) -> Pool:
    seed, numbered, extra_share = job
    photos = [
        Image.fromarray(getattr(skimage_data, name)()).convert("RGB")
        for name in _PHOTOGRAPHS
        if hasattr(skimage_data, name)
    ]
    count = len(numbered)
    pool = Pool(
        np.zeros((count, MODEL_SIZE, MODEL_SIZE, 3), np.uint8),
        np.zeros((count, len(HEADS)), np.int8),
        np.full((count, len(PARTS), 4), np.nan, np.float32),
    )
    for row, (index, scene) in enumerate(numbered):
        rng = np.random.default_rng([seed, 99, index])
        drawing = draw_one(seed, "pretrain", index, scene)
        if rng.random() < extra_share:
            picture, labels = _extra_picture(drawing, scene, photos, rng)
        else:
            picture, labels = _through_jpeg(drawing.image), labels_of(scene)
            if len(scene.people) == 1:
                for part, name in enumerate(PARTS):
                    if name in drawing.boxes[0]:
                        pool.boxes[row, part] = np.array(drawing.boxes[0][name]) / SIZE
        pool.images[row], pool.labels[row] = _shrink(picture), labels
    return pool


def draw_pool(seed: int, count: int, extra_share: float, workers: int) -> Pool:
    """Pictures in memory, at the tower's size."""
    numbered = list(enumerate(plan_scenes(seed, "pretrain", count)))
    jobs = [(seed, numbered[start : start + 500], extra_share) for start in range(0, count, 500)]
    with multiprocessing.Pool(workers) as processes:
        parts = processes.map(_draw_part, jobs, chunksize=1)
    return Pool(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels", "boxes")))


class Readout(nn.Module):
    """Heads over [N, 64, 128] patch tokens: per merged token (4 raster neighbours) and averaged over the 16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128, eps=1e-5, elementwise_affine=False)
        self.classes = nn.Linear(512, sum(CLASSES.values()))
        self.boxes = nn.Linear(512, len(PARTS) * 4)
        self.inside = nn.Linear(128, len(PARTS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> class scores [N, 16, classes], boxes [N, parts, 4], part maps [N, 64, parts]."""
        patches = self.norm(tokens[:, 1:])
        merged = patches.unflatten(1, (-1, 4)).flatten(2)  # [N, 16, 512]
        return self.classes(merged), self.boxes(merged.mean(1)).unflatten(1, (-1, 4)), self.inside(patches)


def _part_maps(boxes: Tensor) -> Tensor:
    """Boxes [N, parts, 4] in 0..1 -> which patch centres lie inside, [N, 64, parts]; NaN boxes hold nothing."""
    centre = (torch.arange(8) + 0.5) / 8
    x, y = centre.repeat(8)[None, :, None], centre.repeat_interleave(8)[None, :, None]
    x1, y1, x2, y2 = (boxes[:, None, :, corner] for corner in range(4))
    return ((x >= x1 - 0.04) & (x <= x2 + 0.04) & (y >= y1 - 0.04) & (y <= y2 + 0.04)).float()


def loss_of(outputs: tuple[Tensor, Tensor, Tensor], labels: Tensor, boxes: Tensor) -> Tensor:
    """Attributes from the averaged and from every single token, boxes, and which patch shows which part."""
    scores, found, maps = (output.float() for output in outputs)
    total, start = scores.new_zeros(()), 0
    for column, head in enumerate(HEADS):
        part, target = scores[..., start : start + CLASSES[head]], labels[:, column]
        start += CLASSES[head]
        keep = target >= 0
        if bool(keep.any()):
            each = target[keep, None].expand(-1, 16).flatten()
            total = total + F.cross_entropy(part[keep].mean(1), target[keep])
            total = total + 0.3 * F.cross_entropy(part[keep].flatten(0, 1), each)
    known = ~boxes.isnan()
    if bool(known.any()):
        total = total + 4 * F.smooth_l1_loss(found[known], boxes[known], beta=0.05)
        asked = known[:, 0, 0]
        total = total + F.binary_cross_entropy_with_logits(maps[asked], _part_maps(boxes[asked]))
    return total


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Light, blur, noise; a few grey pictures, whose colours are not asked. uint8 [N, 3, S, S] -> float32."""
    count = images.shape[0]
    pixels, labels = images.float(), labels.clone()
    grey = torch.rand(count, generator=generator) < 0.06
    pixels[grey] = pixels[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    for head in _COLOUR_HEADS:
        labels[grey, HEADS.index(head)] = -1
    blurred = torch.rand(count, generator=generator) < 0.1
    pixels[blurred] = F.avg_pool2d(F.pad(pixels[blurred], (1, 1, 1, 1), mode="replicate"), 3, 1)
    gain = 1 + (torch.rand(count, 1, 1, 1, generator=generator) - 0.5) * 0.12
    pixels = pixels * gain + torch.randn(count, 1, 1, 1, generator=generator) * 3
    pixels = (
        pixels + torch.randn(pixels.shape, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 5
    )
    return normalise(pixels.clamp(0, 255)), labels


@torch.no_grad()
def evaluate(tower: nn.Module, readout: Readout, pool: Pool) -> dict[str, float]:
    """Accuracy per head of the averaged tokens."""
    right: dict[str, list[Tensor]] = {head: [] for head in HEADS}
    for start in range(0, len(pool.images), 250):
        images = torch.from_numpy(pool.images[start : start + 250]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(pool.labels[start : start + 250]).long()
        scores = readout(tower(normalise(images)))[0].mean(1)
        for column, (head, part) in enumerate(zip(HEADS, scores.split(list(CLASSES.values()), 1), strict=True)):
            keep = labels[:, column] >= 0
            right[head].append((part.argmax(1) == labels[:, column])[keep])
    return {head: round(float(torch.cat(hits).float().mean()), 4) for head, hits in right.items()}


def train_tower(
    seed: int,
    pictures: int,
    steps: int,
    start: Mapping[str, Tensor] | None = None,
    peak: float = 1.2e-3,
    workers: int = 2,
) -> tuple[Eva, dict[str, float]]:
    """The whole training; ``start`` holds weights to go on from. Returns the tower and its held-out accuracies."""
    started = time.perf_counter()
    pool, held_out = draw_pool(seed, pictures, 0.25, workers), draw_pool(seed + 1, 2000, 0.0, workers)
    log.info("%d pictures drawn in %.0f s", pictures, time.perf_counter() - started)
    torch.manual_seed(seed)
    tower, readout, batch = build_tower(), Readout(), 64
    if start is not None:
        tower.load_state_dict(dict(start), strict=True)
    parameters = [*tower.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.03, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    order, started = torch.randperm(pictures, generator=generator), time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 300, 0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        at = step * batch % (pictures - batch)
        rows = order[at : at + batch].numpy()
        images = torch.from_numpy(pool.images[rows]).permute(0, 3, 1, 2)
        pixels, labels = augment(images, torch.from_numpy(pool.labels[rows]).long(), generator)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = readout(tower(pixels))
        loss = loss_of(outputs, labels, torch.from_numpy(pool.boxes[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 250 == 249 or step + 1 == steps:
            rate = (step + 1) * batch / (time.perf_counter() - started)
            log.info(
                "step %d/%d loss %.3f, %.0f pictures/s, held out %s",
                step + 1,
                steps,
                loss.item(),
                rate,
                evaluate(tower, readout, held_out),
            )
    return tower, evaluate(tower, readout, held_out)
