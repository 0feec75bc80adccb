"""Measures a model on held-out samples while it trains: loss, metrics of generated answers, canaries."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minigpt4.common.config_run import LOSS
from minigpt4.common.dist import DistContext
from minigpt4.common.registry import registry
from minigpt4.common.schema import Config, ProcessorConfig
from minigpt4.common.sharding import is_sharded_run, let_go
from minigpt4.common.types import Batch, Sample, Turn
from minigpt4.conversation.encoding import Encoder
from minigpt4.datasets.collate import SampleDataset, collate_padded
from minigpt4.datasets.formats import with_images
from minigpt4.datasets.pictures import open_image
from minigpt4.metrics.answers import AnswerMetric
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.processors.base import make_text_processor
from minigpt4.runners import job
from minigpt4.runners.vision_cache import canary_processor
from minigpt4.tasks.answering import Answered, answer_samples
from minigpt4.tasks.base_task import BaseTask, Training

log = logging.getLogger(__name__)

_ANSWER_BATCH = 16


class ValidationBatches(Dataset[Batch]):
    """This rank's share of a validation split, in order, without shuffling or repetition.

    ``in_step``: every rank gets as many batches as the one with most; the further ones have no targets.
    """

    def __init__(
        self, dataset: SampleDataset, encoder: Encoder, seed: int, dist: DistContext, in_step: bool = False
    ) -> None:
        self._dataset, self._encoder, self._seed = dataset, encoder, seed
        self._indices = range(dist.rank, len(dataset), dist.world_size)
        self._size = dataset.cfg.batch_size
        most = math.ceil(len(dataset) / dist.world_size) if in_step else len(self._indices)
        self._count = math.ceil(most / self._size)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self):
            raise IndexError(number)
        mine = self._indices[number * self._size : (number + 1) * self._size]
        batch = collate_padded([self._dataset.sample(0, index, self._seed) for index in mine or (0,)], self._encoder)
        return batch if mine else batch.without_targets()


@dataclass(frozen=True)
class Scores:
    """``values``: 'val_<metric>/<data set>', and 'val_<metric>', the mean of the data sets. ``canaries``: on rank 0.

    ``answers``: data set -> its generated answers as ``kept_answers`` describes them, where a metric asked for them.
    """

    values: dict[str, float] = field(default_factory=dict)
    canaries: list[Answered] = field(default_factory=list)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def is_lower_better(metric: str) -> bool:
    """Loss falls; every registered metric rises."""
    return metric.partition("/")[0] == LOSS


class Validator:
    """Everything ``run.valid`` asks for. Every rank measures its share and comes to the same numbers."""

    def __init__(
        self,
        cfg: Config,
        model: GenerationMixin,
        task: BaseTask,
        datasets: Sequence[SampleDataset],
        dist: DistContext,
        features: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """features: of the pictures of canaries by path, [P, C'], where the model reads no pixels."""
        self._features = features
        self.cfg, self.valid, self.model, self.task, self.dist = cfg, cfg.run.valid, model, task, dist
        self.datasets = list(datasets)
        self._facts: dict[tuple[str, int], dict[str, Any]] = {}  # the same samples are asked at every validation
        encoder = model.encoder
        self.options = GenerateOptions(
            max_new_tokens=self.valid.max_new_tokens, stop=encoder.stop_texts, stop_ids=encoder.stop_ids
        )
        self._in_step = is_sharded_run(cfg.run, dist)  # then ranks call the model equally often
        self.canaries = self._chosen_canaries() if dist.is_main or self._in_step else []

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to measure or to ask."""
        return bool(self.datasets or self.valid.canaries)

    def run(self, training: Training, tell: Callable[[str], None] = lambda text: None) -> Scores:
        """One validation; ``tell`` is given a line of progress now and then."""
        values: dict[str, float] = {}
        answers: dict[str, list[dict[str, Any]]] = {}
        for dataset in self.datasets:
            if LOSS in self.valid.metrics:
                tell(f"validating {dataset.name}: loss of {len(dataset)} samples")
                values[f"val_loss/{dataset.name}"] = self._loss(training, dataset)
            scores, rows = self._answer_metrics(dataset, tell)
            values.update(scores)
            if rows:
                answers[dataset.name] = rows
        for metric in self.valid.metrics if self.datasets else ():
            parts = [values[f"val_{metric}/{dataset.name}"] for dataset in self.datasets]
            values[f"val_{metric}"] = sum(parts) / len(parts)
        canaries: list[Answered] = []
        if self.canaries:
            tell(f"asking {len(self.canaries)} canaries")
            numbers = range(len(self.canaries))
            canaries = answer_samples(self.model, self.canaries.__getitem__, numbers, self.options, _ANSWER_BATCH)
        if self._in_step:
            let_go(self.model)
        return Scores(values, canaries, answers)

    def _loss(self, training: Training, dataset: SampleDataset) -> float:
        batches = ValidationBatches(dataset, self.model.encoder, self.cfg.run.seed, self.dist, self._in_step)
        loader = DataLoader(
            batches, batch_size=None, num_workers=self.cfg.run.num_workers, worker_init_fn=job.outlive_signals
        )
        return self.task.validate(training, loader)

    def _answer_metrics(
        self, dataset: SampleDataset, tell: Callable[[str], None]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores of generated answers, and the answers in the order of the data set."""
        names = [name for name in self.valid.metrics if name != LOSS]
        if not names:
            return {}, []
        count = min(len(dataset), self.valid.max_samples)
        chosen = [place * len(dataset) // count for place in range(count)]  # spread evenly, the same every time
        mine = chosen[self.dist.rank :: self.dist.world_size]
        repeated = chosen[:1] if self._in_step and len(mine) * self.dist.world_size < count else []
        done, places = [0], dict[int, int]()

        def advance(number: int) -> None:
            done[0] += number
            tell(f"validating {dataset.name}: {done[0]} of {len(mine)} answers")

        def sample(index: int) -> Sample:
            found = dataset.sample(0, index, self.cfg.run.seed)
            places[index] = (index + len(found.passed_over)) % len(dataset)
            return found

        answered = answer_samples(self.model, sample, [*mine, *repeated], self.options, _ANSWER_BATCH, advance)
        answered = answered[: len(mine)]
        own = [(index, row, self._known(dataset, places[index])) for index, row in zip(mine, answered, strict=True)]
        rows = sorted((row for share in self.dist.gather_objects(own) for row in share), key=lambda row: row[0])
        answers, references = [row.answer for _, row, _ in rows], [row.reference for _, row, _ in rows]
        metrics: dict[str, AnswerMetric] = {name: registry.get("metric", name) for name in names}
        scores = {f"val_{name}/{dataset.name}": metric.score(answers, references) for name, metric in metrics.items()}
        return scores, [_kept(row, known, metrics) for _, row, known in rows]

    def _known(self, dataset: SampleDataset, index: int) -> dict[str, Any]:
        key = (dataset.name, index)
        if key not in self._facts:
            self._facts[key] = dataset.facts(index)
        return self._facts[key]

    def _chosen_canaries(self) -> list[Sample]:
        """The user's questions, then the first held-out samples of the data sets in turn."""
        samples = [self._own_canary(number) for number in range(len(self.valid.canaries))]
        for number in range(self.valid.num_canaries if self.datasets else 0):
            index, which = divmod(number, len(self.datasets))
            dataset = self.datasets[which]
            if index < len(dataset):
                samples.append(dataset.sample(0, index, self.cfg.run.seed))
        return samples

    def _own_canary(self, number: int) -> Sample:
        canary = self.valid.canaries[number]
        text = make_text_processor(ProcessorConfig(name=job.question_processor(list(self.cfg.datasets.values()))))
        turn = Turn(with_images(text(canary.question), 1 if canary.image else 0), "")
        if not canary.image:
            return Sample((turn,), (), f"canary {number + 1}")
        picture = self._features.get(canary.image)
        if picture is None:
            picture = canary_processor(self.model)(open_image(canary.image))
        return Sample((turn,), (picture,), f"canary {number + 1}")


def _kept(row: Answered, known: Mapping[str, Any], metrics: Mapping[str, AnswerMetric]) -> dict[str, Any]:
    """One line of a file of answers."""
    correct = {name: metric.is_right(row.answer, row.reference) for name, metric in metrics.items() if metric.is_right}
    said = {"id": row.source, "question": row.question, "reference": row.reference, "answer": row.answer}
    return {**said, "images": [], **known, "correct": correct}
