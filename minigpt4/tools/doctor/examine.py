"""One record as training would read it, and everything that is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from minigpt4.common.errors import DataError
from minigpt4.common.types import IMAGE_TAG, Turn
from minigpt4.conversation.encoding import Encoder
from minigpt4.datasets.formats import EmotionMapping, emotion_label, identify, num_images, refer
from minigpt4.datasets.map_dataset import AnnotationDataset, MapDataset, record_id
from minigpt4.tools.doctor import texts
from minigpt4.tools.doctor.checks import CHECKS, ERROR
from minigpt4.tools.doctor.pictures import Picture, examine_picture

_IDS = ("id", "question_id", "instance_id")
"""Fields in which two records may differ and still be the same."""
_KEPT = 4096
"""Pictures remembered: records that share one mostly follow each other."""


@dataclass(frozen=True)
class Split:
    """One split of a data set. chosen: the samples to look at. stride: every how manieth picture is decoded whole."""

    dataset: MapDataset
    split: str
    chosen: Sequence[int]
    stride: int
    compare: bool

    @property
    def title(self) -> str:
        """'faces' or 'faces (val)'."""
        return self.dataset.name if self.split == "train" else f"{self.dataset.name} ({self.split})"

    @property
    def folders(self) -> dict[str, str]:
        """Where annotation files and pictures lie, for data sets of files."""
        if not isinstance(self.dataset, AnnotationDataset):
            return {}
        parents = {str(path.parent) for path in self.dataset.annotations.paths}
        found = {"annotations": parents.pop()} if len(parents) == 1 else {}
        root = self.dataset.finder.root
        return found if root is None else {**found, "pictures": str(root)}


@dataclass(frozen=True)
class Finding:
    """One problem of one record, with its place. index -1: of the data set as a whole. image: a path, or empty."""

    check: str
    index: int
    detail: str
    where: str = ""
    record_id: str = ""
    image: str = ""
    text: str = ""


@dataclass
class Facts:
    """What is kept of one record until all are seen. Hashes stand for texts and files.

    identity: of the record without its ids. asked: (question on its picture, answer). pictures: (content, pattern).
    counts: (histogram, value). contents: hashes of pictures that have no file of their own.
    """

    index: int
    findings: list[Finding] = field(default_factory=list)
    identity: bytes = b""
    asked: tuple[bytes, bytes] | None = None
    pictures: list[tuple[bytes, int | None]] = field(default_factory=list)
    counts: list[tuple[str, str | int]] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)

    @property
    def is_wrong(self) -> bool:
        """Whether one of the findings is an error."""
        return any(CHECKS[finding.check].severity == ERROR for finding in self.findings)


class Examiner:
    """Looks at the records of one split. Picklable; works in any process."""

    def __init__(self, split: Split, encoder: Encoder | None, seed: int) -> None:
        self.split, self.encoder, self.seed = split, encoder, seed
        self._special = tuple(encoder.tokenizer.special) if encoder is not None else ()
        self._seen: dict[Path, Picture] = {}

    def examine(self, place: int) -> Facts:
        """Facts of the ``place``-th chosen sample."""
        dataset, index = self.split.dataset, self.split.chosen[place]
        facts = Facts(index)
        where = dataset.where(index)
        try:
            record = dataset.record(index)
        except DataError as error:
            facts.findings.append(Finding("record-unusable", index, str(error), where))
            return facts
        found = list(self._problems(record, place, facts))
        if found:
            facts.findings += self._findings(found, record, index, where)
        self._count(record, facts)
        return facts

    def _findings(
        self, found: list[tuple[str, str]], record: Mapping[str, Any], index: int, where: str
    ) -> Iterator[Finding]:
        image, names = "", record.get("images") or []
        try:
            files = [str(file) for file in self.split.dataset.pictures(index) if isinstance(file, Path)]
            image = files[0] if files else ""
        except DataError:
            image = str(names[0]) if names else ""
        text = next((item for item in reversed(list(texts.record_texts(record)))), "")
        for check, detail in dict(reversed(found)).items():  # one finding per check: its first
            yield Finding(check, index, detail, where, record_id(dict(record), index), image, text[:400])

    def _problems(self, record: Mapping[str, Any], place: int, facts: Facts) -> Iterator[tuple[str, str]]:
        index = facts.index
        sizes: list[tuple[int, int]] = []
        is_picture_wrong = False
        try:
            sources = self.split.dataset.pictures(index)
        except DataError as error:
            sources, is_picture_wrong = [], True
            yield "image-missing", str(error)
        for source in sources:
            if isinstance(source, bytes):  # in a tar; the record does not name it
                facts.contents.append(hashlib.blake2b(source, digest_size=12).hexdigest())
            picture = self._picture(source, place)
            yield from picture.problems
            if picture.size is None:
                is_picture_wrong = True
            else:
                sizes.append(picture.size)
                facts.counts.append(("picture size", _power(max(picture.size))))
            if self.split.compare:
                facts.pictures.append((picture.content, picture.pattern))
        recipe = self.split.dataset.recipe
        has_box = bool(sizes) and recipe.format in (refer, identify)
        box = texts.box_problem(record.get("box"), sizes[0], recipe.boxes) if has_box else None
        if box is not None:
            yield box
        is_box_wrong = box is not None and CHECKS[box[0]].severity == ERROR
        for text in texts.record_texts(record):
            yield from texts.text_problems(text)
        # What is explained already is not reported a second time as an unusable record.
        yield from self._turn_problems(record, sizes, facts, is_picture_wrong or is_box_wrong)

    def _turn_problems(
        self, record: Mapping[str, Any], sizes: list[tuple[int, int]], facts: Facts, is_explained: bool
    ) -> Iterator[tuple[str, str]]:
        rng = Random(f"{self.seed}/{self.split.dataset.name}/0/{facts.index}")  # the draws of the first pass
        try:
            turns = self.split.dataset.recipe.turns({**record, "image_sizes": sizes}, rng)
        except DataError as error:
            if texts.has_empty_answer(record):
                yield "answer-empty", str(error)
            elif texts.tags_differ(record, num_images(record)):
                yield "image-tags", texts.tags_differ(record, num_images(record))
            elif not is_explained:
                yield "record-unusable", str(error)
            return
        count, tags = len(record["images"]), sum(turn.prompt.count(IMAGE_TAG) for turn in turns)
        if tags not in (0, count):
            yield "image-tags", f"{count} images, {tags} {IMAGE_TAG}"
        elif count and not tags:
            yield "image-unused", f"prompt: {texts.shortened(turns[0].prompt)}"
        yield from self._answer_problems(turns, facts)
        yield from self._length_problems(turns)

    def _answer_problems(self, turns: Sequence[Turn], facts: Facts) -> Iterator[tuple[str, str]]:
        for turn in turns:
            answer = turn.answer
            facts.counts.append(("answer length in words", _power(len(answer.split()))))
            if not answer.strip():
                yield "answer-empty", f"to: {texts.shortened(turn.prompt)}"
            if texts.is_refusal(answer):
                yield "answer-refusal", texts.shortened(answer)
            special = texts.spelled_special(answer, self._special)
            if special:
                yield "special-token", f"'{special}' in: {texts.shortened(answer)}"
            yield from texts.box_text_problems(answer)
            yield from texts.box_text_problems(turn.prompt)
        if len(turns) == 1 and 0 < len(turns[0].answer.split()) <= 3:
            facts.counts.append(("short answers and labels", turns[0].answer.strip(" .")))

    def _length_problems(self, turns: Sequence[Turn]) -> Iterator[tuple[str, str]]:
        if self.encoder is None:
            return
        try:
            encoded = self.encoder.encode_turns(turns)
        except DataError as error:
            yield "record-unusable", str(error)
            return
        if encoded.is_truncated:
            yield (
                "answer-cut",
                f"more than {self.encoder.max_txt_len} tokens, {sum(len(t.answer) for t in turns)} letters",
            )
        if encoded.is_prompt_cut:
            yield "prompt-cut", f"more than {self.encoder.max_context_len} positions"

    def _picture(self, source: Path | bytes, place: int) -> Picture:
        decode = place % self.split.stride == 0
        if isinstance(source, bytes):
            return examine_picture(source, decode, self.split.compare)
        known = self._seen.get(source)
        if known is None:
            known = examine_picture(source, decode, self.split.compare)
            if len(self._seen) >= _KEPT:
                self._seen.clear()
            self._seen[source] = known
        return known

    def _count(self, record: Mapping[str, Any], facts: Facts) -> None:
        if facts.contents:
            record = {**record, "images": facts.contents, "image": ""}
        facts.identity = _hash({key: value for key, value in record.items() if key not in _IDS})
        asked = texts.asked(record)
        if asked is not None:
            facts.asked = _hash([record["images"], asked[0]]), _hash(asked[1])
        dataset = self.split.dataset
        if isinstance(dataset, AnnotationDataset):
            section = dataset.annotations.section(dataset.annotation_index(facts.index))
            facts.counts += [("sections", section)] if section else []
        if isinstance(self.split.dataset.recipe.format, EmotionMapping):
            facts.counts.append(("emotions", _emotion(str(record.get("text", "")))))


def _emotion(text: str) -> str:
    try:
        return emotion_label(" ".join(text.split()))
    except DataError:
        return "(none)"


def _hash(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _power(value: int) -> int:
    """The largest power of two that is not above ``value``; 0 for 0."""
    return 1 << (value.bit_length() - 1) if value else 0
