"""Whether a record is about a face: what its caption says, and what a detector sees in its picture."""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from PIL import Image, UnidentifiedImageError

from minigpt4.common.errors import DataError

GROUPS = ("person", "face", "exclude", "figures")
DEFAULT_WORDS = Path(__file__).resolve().parent / "face_words.txt"


class Face(NamedTuple):
    """A box in pixels of the stored picture; confidence 0..1."""

    x: float
    y: float
    width: float
    height: float
    confidence: float


Detector = Callable[[Image.Image], Sequence[Sequence[float]]]
"""An opened picture -> rows (x, y, width, height, confidence) in its pixels."""


@dataclass(frozen=True)
class CaptionGate:
    """Word lists of a file as regular expressions, one per group."""

    patterns: Mapping[str, re.Pattern[str]]
    drops_figures: bool = False

    def __call__(self, caption: str) -> str:
        """Empty when the caption speaks of a person and a face, else the reason why it does not pass."""
        text = self.patterns["exclude"].sub(" ", caption.lower())
        if not self.patterns["person"].search(text):
            return "caption: no person word"
        if not self.patterns["face"].search(text):
            return "caption: no face word"
        if self.drops_figures and self.patterns["figures"].search(text):
            return "caption: a figure or drawing"
        return ""


def read_words(path: Path, drops_figures: bool = False) -> CaptionGate:
    """The gate that a word file describes. Raises DataError with file and line."""
    entries: dict[str, list[str]] = {name: [] for name in GROUPS}
    group = ""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1]
            if group not in entries:
                raise DataError(f"{path}, line {number}: group '{group}', allowed: {', '.join(GROUPS)}")
        elif not group:
            raise DataError(f"{path}, line {number}: '{line}' stands before the first [group]")
        else:
            entries[group].append(_entry(line, path, number))
    for name in ("person", "face"):
        if not entries[name]:
            raise DataError(f"{path}: group [{name}] is empty")
    nothing = r"(?!)"
    joined = {name: "|".join(found) or nothing for name, found in entries.items()}
    return CaptionGate({name: re.compile(rf"(?<!\w)(?:{text})(?!\w)") for name, text in joined.items()}, drops_figures)


def _entry(line: str, path: Path, number: int) -> str:
    if not (len(line) > 2 and line.startswith("/") and line.endswith("/")):
        return re.escape(line.lower())
    try:
        re.compile(line[1:-1])
    except re.error as error:
        raise DataError(f"{path}, line {number}: no regular expression: {error}") from None
    return f"(?:{line[1:-1]})"


@dataclass(frozen=True)
class FaceRule:
    """What counts as a face: sure enough, and large enough to be learnt from."""

    min_confidence: float = 0.9
    min_pixels: int = 40
    min_share: float = 0.05

    def faces(self, seen: Seen) -> list[Face]:
        """The faces whose shorter side is at least ``min_pixels`` and ``min_share`` of the picture's shorter side."""
        least = max(self.min_pixels, self.min_share * min(seen.width, seen.height))
        return [
            face
            for face in seen.faces
            if face.confidence >= self.min_confidence and min(face.width, face.height) >= least
        ]


@dataclass(frozen=True)
class Seen:
    """What a detector found in one picture of ``width`` x ``height`` pixels; ``error`` tells an unreadable one."""

    width: int = 0
    height: int = 0
    faces: tuple[Face, ...] = ()
    error: str = ""

    def largest_share(self, faces: Sequence[Face]) -> float:
        """Area of the largest of ``faces`` over the picture's area."""
        area = self.width * self.height
        return max((face.width * face.height / area for face in faces), default=0.0) if area else 0.0


def detect(path: Path, detector: Detector) -> Seen:
    """Opens one picture and asks the detector. A picture that cannot be read is told in ``error``."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            faces = [Face(*map(float, row)) for row in detector(image)]
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Seen(error=" ".join(str(error).split()) or type(error).__name__)
    return Seen(width, height, tuple(faces))


def load_detector(name: str, neighbours: int) -> tuple[Detector, dict[str, Any]]:
    """The built-in detector for 'haar', else ``module:function``; with what the statistics say about it."""
    if name == "haar":
        haar = HaarDetector(neighbours)
        return haar, haar.facts
    module, _, attribute = name.partition(":")
    if not attribute:
        raise DataError(f"--detector: found '{name}', allowed: haar or module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a file in the current folder, as python -m would find it
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DataError(f"--detector {name}: {error}") from None
    version = str(getattr(sys.modules[module], "__version__", ""))
    return found, {"name": name, "version": version}


class HaarDetector:
    """OpenCV's frontal and profile Haar cascades (Viola and Jones, 2001), which come with its wheel.

    A cascade says yes or no, so the confidence is always 1; ``neighbours`` (overlapping hits asked for) makes it
    stricter. Fast and without weights to fetch, but made for upright faces: expect misses, and log them.
    """

    LONG_SIDE = 640
    """Larger pictures are shrunk first: what is smaller than 5 % of them does not pass the rule, and larger ones show
    more patterns that look like a face (a photograph of a cup at 1024 pixels: one, at 512: none)."""
    CASCADES = ("haarcascade_frontalface_default.xml", "haarcascade_profileface.xml")

    def __init__(self, neighbours: int = 8) -> None:
        try:
            import cv2
        except ImportError:
            raise DataError("the face detector needs OpenCV 4: pip install 'minigptface[faces]'") from None
        if not hasattr(cv2, "CascadeClassifier"):
            raise DataError(f"OpenCV {cv2.__version__} has no Haar cascades: pip install 'opencv-python-headless<5'")
        cv2.setNumThreads(1)  # pictures are shared out over threads instead
        self._neighbours, self._cv2 = neighbours, cv2
        self._local = threading.local()  # a cascade keeps its scratch memory: one per thread
        self.facts = {
            "name": "haar",
            "version": f"opencv {cv2.__version__}",
            "cascades": list(self.CASCADES),
            "neighbours": neighbours,
            "long_side": self.LONG_SIDE,
        }

    def _cascades(self) -> list[Any]:
        if not hasattr(self._local, "cascades"):
            folder = Path(self._cv2.data.haarcascades)
            self._local.cascades = [self._cv2.CascadeClassifier(str(folder / name)) for name in self.CASCADES]
        found: list[Any] = self._local.cascades
        return found

    def __call__(self, image: Image.Image) -> list[Face]:
        """Faces of an opened picture; a profile that overlaps a frontal face counts once."""
        import numpy as np

        width, height = image.size
        image.draft("L", (self.LONG_SIDE, self.LONG_SIDE))  # JPEG decodes at 1/2, 1/4, 1/8 for a fraction of the time
        grey = image.convert("L")
        if max(grey.size) > self.LONG_SIDE:
            grey.thumbnail((self.LONG_SIDE, self.LONG_SIDE), Image.Resampling.BILINEAR)
        pixels = np.asarray(grey)
        faces: list[Face] = []
        for cascade in self._cascades():
            for x, y, w, h in cascade.detectMultiScale(pixels, 1.1, self._neighbours, minSize=(24, 24)):
                across, down = width / grey.width, height / grey.height
                face = Face(float(x * across), float(y * down), float(w * across), float(h * down), 1.0)
                if not any(_overlap(face, other) > 0.3 for other in faces):
                    faces.append(face)
        return faces


def _overlap(one: Face, other: Face) -> float:
    """Intersection over the smaller box."""
    across = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    down = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    smaller = min(one.width * one.height, other.width * other.height)
    return max(0.0, across) * max(0.0, down) / smaller if smaller else 0.0


@dataclass
class DetectionCache:
    """What was seen so far, one JSON line per picture, so that a run that was stopped goes on.

    The first line names the detector; a picture counts as seen while its size and time of change stay the same.
    """

    path: Path
    facts: Mapping[str, Any]
    _known: dict[str, tuple[list[int], Seen]] = field(default_factory=dict)
    _stream: TextIO | None = None

    def __enter__(self) -> DetectionCache:
        whole = 0
        if self.path.is_file():
            with self.path.open("rb") as stream:
                for line in stream:
                    if not line.endswith(b"\n"):
                        break  # the run was stopped in the middle of it
                    self._read(json.loads(line), is_first=whole == 0)
                    whole += len(line)
        self._stream = self.path.open("a", encoding="utf-8")
        self._stream.truncate(whole)
        if not whole:
            self._write({"detector": dict(self.facts)})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stream is not None
        self._stream.close()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, path: Path) -> Seen | None:
        """What was seen in ``path``, if it is the same file."""
        version, seen = self._known.get(str(path), ([], None))
        return seen if version == _version(path) else None

    def add(self, path: Path, seen: Seen) -> None:
        """Remembers a picture. A line is written at once, so a stop loses one picture at most."""
        version = _version(path)
        self._known[str(path)] = (version, seen)
        row = {"image": str(path), "version": version, "size": [seen.width, seen.height]}
        self._write({**row, "faces": [list(face) for face in seen.faces], "error": seen.error})

    def _read(self, row: dict[str, Any], is_first: bool) -> None:
        if is_first:
            if row.get("detector") != dict(self.facts):
                raise DataError(f"{self.path}: made by another detector ({row.get('detector')}); delete it, or --cache")
            return
        faces = tuple(map(Face._make, row["faces"]))
        self._known[row["image"]] = (row["version"], Seen(*row["size"], faces, row["error"]))

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()


def _version(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def detect_all(paths: Iterator[Path], detector: Detector, cache: DetectionCache, threads: int) -> Iterator[Path]:
    """Fills ``cache``; yields each path when it is known. The order may differ from that of ``paths``."""
    from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

    look = partial(detect, detector=detector)
    waiting: dict[Future[Seen], Path] = {}
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            if cache.get(path) is not None:
                yield path
                continue
            waiting[pool.submit(look, path)] = path
            while len(waiting) >= 4 * threads:
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    path = waiting.pop(done)
                    cache.add(path, done.result())
                    yield path
        for done in list(waiting):
            path = waiting.pop(done)
            cache.add(path, done.result())
            yield path
