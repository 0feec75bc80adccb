"""Answers on disk: what is done stays done, and answers of different runs never mix.

::

    answers.jsonl             one record per question in the order of the questions, once all are answered
    answers.jsonl.run.json    what the answers depend on besides the question: weights and options
    answers.jsonl.partial     answers of an unfinished run
    answers.jsonl.rank0       answers since its last start, one file per rank
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from minigpt4.common.dist import DistContext
from minigpt4.common.errors import DataError, MiniGPT4Error
from minigpt4.common.files import open_atomically, write_atomically
from minigpt4.evaluation.questions import Answer, Question, check_ids

T = TypeVar("T")


class Ledger:
    """Answers to ``questions`` in ``out``; every method is called by all ranks. Only rank 0 looks at old files."""

    def __init__(
        self, out: Path, questions: Sequence[Question], source: Mapping[str, str], is_overwriting: bool = False
    ) -> None:
        """source: name -> value of everything but the question that changes an answer."""
        self.out, self.questions, self.source = out, questions, dict(source)
        self._is_overwriting = is_overwriting
        self._own: TextIO | None = None

    def check(self, dist: DistContext) -> int:
        """Number of answers that are there already; changes nothing. Raises DataError when they cannot go on."""
        return len(on_main(dist, self._known))

    def open(self, dist: DistContext) -> dict[str, Answer]:
        """Answers that need not be asked for again, by id. Raises DataError as ``check`` does."""
        known: dict[str, Answer] = on_main(dist, self._prepared)
        self._own = self._rank_file(dist.rank).open("w", encoding="utf-8")
        return known

    def append(self, answers: Iterable[Answer]) -> None:
        """Answers of this rank; on disk when this returns."""
        assert self._own is not None, "the ledger is not open"
        for answer in answers:
            self._own.write(_line(answer))
        self._own.flush()

    def close(self) -> None:
        """Leaves the files for a later run to go on with."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def finish(self, answers: Sequence[Answer], dist: DistContext) -> None:
        """Write the whole file, ``answers`` in their order, and remove what was kept on the way."""
        self.close()
        dist.barrier()  # nobody writes any more

        def write() -> None:
            with open_atomically(self.out) as file:
                file.writelines(map(_line, answers))
            self._remove_parts()

        on_main(dist, write)

    @property
    def _sidecar(self) -> Path:
        return self.out.with_name(f"{self.out.name}.run.json")

    @property
    def _partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    def _rank_file(self, rank: int) -> Path:
        return self.out.with_name(f"{self.out.name}.rank{rank}")

    def _rank_files(self) -> list[Path]:
        prefix = f"{self.out.name}.rank"
        found = self.out.parent.iterdir() if self.out.parent.is_dir() else iter(())
        return sorted(path for path in found if path.name.removeprefix(prefix).isdecimal())

    def _remove_parts(self) -> None:
        for path in (self._partial, *self._rank_files()):
            path.unlink(missing_ok=True)

    def _prepared(self) -> dict[str, Answer]:
        known = self._known()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self._is_overwriting:
            self.out.unlink(missing_ok=True)
            self._remove_parts()
        write_atomically(self._sidecar, json.dumps(self.source, indent=1, ensure_ascii=False) + "\n")
        with open_atomically(self._partial) as file:
            file.writelines(map(_line, known.values()))
        for path in self._rank_files():
            path.unlink()
        return known

    def _known(self) -> dict[str, Answer]:
        """Answers without error of the files that are there."""
        check_ids(self.questions)
        if self.out.is_dir():
            raise DataError(f"'{self.out}' is a folder, expected a file name for the answers")
        if self._is_overwriting:
            return {}
        paths = [path for path in (self.out, self._partial, *self._rank_files()) if path.exists()]
        if not paths:
            return {}
        self._check_source(paths[0])
        asked = {question.id: question for question in self.questions}
        known: dict[str, Answer] = {}
        for path in paths:
            for number, record in enumerate(_records(path), start=1):
                answer = self._recognised(record, asked, f"{path}, line {number}")
                if not answer.error:
                    known[answer.question.id] = answer
        return known

    def _check_source(self, found: Path) -> None:
        if not self._sidecar.is_file():
            raise DataError(f"'{found}' exists, but not {self._sidecar.name} that tells where it is from; {_WAYS}")
        before = json.loads(self._sidecar.read_text(encoding="utf-8"))
        names = dict.fromkeys((*before, *self.source))
        changed = [name for name in names if before.get(name) != self.source.get(name)]
        if changed:
            shown = "; ".join(f"{name} was {before.get(name)!r}, is {self.source.get(name)!r}" for name in changed)
            raise DataError(f"'{self.out}' belongs to another run: {shown}. {_WAYS}")

    def _recognised(self, record: Mapping[str, Any], asked: Mapping[str, Question], where: str) -> Answer:
        question = asked.get(str(record.get("id")))
        if question is None:
            raise DataError(f"{where}: answers the id '{record.get('id')}', which is not asked any more. {_WAYS}")
        if record.get("question") != question.prompt or record.get("images") != list(question.images):
            before = f"{record.get('question')!r} about {record.get('images')}"
            now = f"{question.prompt!r} about {list(question.images)}"
            raise DataError(f"{where}: id '{question.id}' was {before}, is {now}. {_WAYS}")
        return Answer(question, str(record.get("answer", "")), str(record.get("error", "")))


_WAYS = "Give another --out, or --overwrite to begin anew"


def on_main(dist: DistContext, action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank; a user's mistake found there is raised on all of them."""
    outcome: tuple[T | None, MiniGPT4Error | None] = (None, None)
    if dist.is_main:
        try:
            outcome = (action(), None)
        except MiniGPT4Error as error:
            outcome = (None, error)
    result, failure = dist.broadcast_object(outcome)
    if failure is not None:
        raise failure
    value: T = result
    return value


def _line(answer: Answer) -> str:
    return json.dumps(answer.record(), ensure_ascii=False) + "\n"


def _records(path: Path) -> list[dict[str, Any]]:
    """Records of a result file; a last line that was cut off is left out. Raises DataError for other broken lines."""
    *lines, rest = path.read_bytes().split(b"\n")
    del rest  # empty, or a line that was not written to its end
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: is no JSON record ({error}). {_WAYS}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: found {record!r}, expected a record. {_WAYS}")
        records.append(record)
    return records
