"""The whole way on a CPU in minutes: draw faces, train two stages, evaluate, fine-tune on photographs, chat.

Every step is the program a user would call; this file only calls them in order and tabulates. ``make quickstart``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from minigpt4.common.checkpoint import read_checkpoint
from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.files import write_atomically
from minigpt4.metrics.accuracy import exact_accuracy, majority_accuracy, wilson_interval
from minigpt4.tools.pictures import draw_chat
from minigpt4.tools.quickstart_boxes import boxes_table, constant_boxes, draw_examples, read_records, scores_by_phrase
from minigpt4.tools.steps import Steps, call

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "train_configs"
_DRAWING = ("draw_faces", "face_drawing", "face_formats")
CHAT_QUESTIONS = (
    "What is the facial expression of the person?",
    "Does the person wear glasses?",
    "Describe the person.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet; returns the exit code."""
    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/quickstart"), help="default: output/quickstart")
    parser.add_argument("--train", type=int, default=4000, help="drawn training faces (default 4000)")
    parser.add_argument("--test", type=int, default=400, help="drawn test faces (default 400)")
    parser.add_argument("--boxes", action="store_true", help="then train and score boxes: [refer] and others")
    given = parser.parse_args(argv)
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["QUICKSTART"] = str(out)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # One thread per process: small matrices gain nothing, and waiting threads on a busy machine cost 10 times.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    console = Console(record=True, width=100 if not sys.stdout.isatty() else None)
    try:
        quickstart = Quickstart(out, given.train, given.test, console)
        quickstart.run()
        if given.boxes:
            quickstart.run_boxes()
    except MiniGPT4Error as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 2
    return 0


class Quickstart:
    """The steps, in order; each leaves its result under ``out``."""

    def __init__(self, out: Path, num_train: int, num_test: int, console: Console) -> None:
        self.out, self.console = out, console
        self.num_train, self.num_test = num_train, num_test
        self.steps = Steps(out, console)

    def run(self) -> None:
        """Everything, then the table, ``results.json`` and one chat turn."""
        data, photos = self._data()
        stage1 = self._train("stage1", "Stage 1: the projection learns from captions", data)
        face = self._train("face", "Face stage: projection and LoRA learn to answer", data, ckpt=stage1)
        by_type = json.loads(self._evaluate(data, face))
        tuned = self._train("photos", "Your own data: 140 photographs, one YAML block", photos, ckpt=face)
        photo_scores = json.loads(self._evaluate_photos(photos, face, tuned))
        chat = json.loads(self._chat(data, face))
        self._report(by_type, photo_scores, chat, {"face": face, "photos": tuned})

    def run_boxes(self) -> None:
        """Boxes: one more stage, scored by ``eval_scripts/eval_ref.py`` beside the best constant box per phrase."""
        data, stage1 = Path(self._box_data()), self.steps.done["stage1"].result
        trained = self._train("boxes", "Boxes: [refer], [identify], [detection]", str(data), ckpt=stage1)
        config, evaluation = ROOT / "eval_configs/quickstart_boxes_evaluation.yaml", self.out / "evaluation"

        def evaluate() -> str:
            command = [str(ROOT / "eval_scripts/eval_ref.py"), "--cfg-path", str(config), "--split", "val"]
            call([*command, "--ckpt", trained, "--overwrite"], ROOT)
            return str(evaluation / "refcoco_val.json")

        answered = self.steps.run("evaluate_boxes", "Held-out boxes", [trained, config.read_text()], evaluate)
        answers = read_records(Path(answered))
        expressions = read_records(data / "boxes/refcoco/refcoco_val.json")
        constant = constant_boxes(read_records(data / "boxes/refer.json"))
        scores = scores_by_phrase(expressions, answers, constant)
        write_atomically(self.out / "boxes.json", json.dumps({"checkpoint": trained, "scores": scores}, indent=1))
        draw_examples(expressions, answers, data / "boxes/refcoco_images", self.out / "boxes.png")
        self.console.print(boxes_table(scores))
        self.console.print(
            f"\nResults      {_shown(self.out / 'boxes.json')}, boxes.png"
            f"\nCheckpoint   {_shown(trained)}"
            "\n\nDraw boxes in the browser:"
            f"\n  .venv/bin/python demo_v2.py --ckpt {_shown(trained)}",
            highlight=False,
            soft_wrap=True,
        )

    def _box_data(self) -> str:
        """Three times as many faces, each seen about once: numbers are learned by heart from fewer."""
        data = self.out / "boxes_data"
        sizes = ["--train", str(3 * self.num_train), "--test", str(self.num_test)]

        def draw() -> str:
            call([str(ROOT / "dataset/draw_faces.py"), "--out", str(data), "--seed", "2", "--force", *sizes], ROOT)
            return str(data)

        return self.steps.run("draw_boxes", "Drawing faces for boxes", [*sizes, *_sources(*_DRAWING)], draw)

    def _data(self) -> tuple[str, str]:
        faces, photos = self.out / "data", self.out / "photos"
        sizes = ["--train", str(self.num_train), "--test", str(self.num_test)]

        def draw() -> str:
            call([str(ROOT / "dataset/draw_faces.py"), "--out", str(faces), "--seed", "1", "--force", *sizes], ROOT)
            return str(faces)

        def write() -> str:
            call([str(ROOT / "dataset/write_photos.py"), "--out", str(photos)], ROOT)
            return str(photos)

        drawn = self.steps.run("draw", "Drawing faces", [*sizes, *_sources(*_DRAWING)], draw)
        return drawn, self.steps.run("write_photos", "Writing photographs", _sources("write_photos"), write)

    def _train(self, name: str, title: str, data: str, ckpt: str = "") -> str:
        """Train one YAML through train.py; returns its last checkpoint directory."""
        config = CONFIGS / f"quickstart_{name}.yaml"
        options = ["--options", f"model.ckpt={ckpt}"] if ckpt else []

        def train() -> str:
            call([str(ROOT / "train.py"), "--cfg-path", str(config), *options], ROOT)
            return str(read_checkpoint(self.out / "jobs" / config.stem).path)

        return self.steps.run(name, title, [config.read_text(), data, self._stamp("draw"), *options], train)

    def _stamp(self, step: str) -> str:
        return self.steps.done[step].key

    def _evaluate(self, data: str, checkpoint: str) -> str:
        """JSON: question type -> accuracy, majority, blank image, untrained projection, n."""

        def evaluate() -> str:
            from minigpt4.tasks.generation_eval import read_questions

            questions = read_questions(Path(data) / "test/questions.json", Path(data))
            answers = {
                "accuracy": self._answers("trained", questions, checkpoint),
                "blank_image": self._answers("blank image", questions, checkpoint, is_blank=True),
                "untrained": self._answers("untrained projection", questions, None),
            }
            return json.dumps(_by_type(questions, answers))

        return self.steps.run("evaluate", "Held-out faces", [checkpoint, data], evaluate)

    def _evaluate_photos(self, photos: str, before: str, after: str) -> str:
        """JSON: accuracy with its interval, majority answer, checkpoint before, n."""

        def evaluate() -> str:
            from minigpt4.tasks.generation_eval import read_questions

            questions = read_questions(Path(photos) / "test.csv", Path(photos))
            references = [question.answer for question in questions]
            accuracy = exact_accuracy(self._answers("photographs", questions, after), references)
            scores = {
                "accuracy": accuracy,
                "interval": wilson_interval(round(accuracy * len(references)), len(references)),
                "majority": majority_accuracy(references),
                "before": exact_accuracy(self._answers("photographs, before", questions, before), references),
                "n": len(references),
            }
            return json.dumps(scores)

        return self.steps.run("evaluate_photos", "Held-out photographs", [before, after, photos], evaluate)

    def _answers(self, title: str, questions: Any, checkpoint: str | None, is_blank: bool = False) -> list[str]:
        from minigpt4 import catalog
        from minigpt4.chat.loading import load_assistant
        from minigpt4.models.generation import GenerateOptions
        from minigpt4.tasks.generation_eval import answer_questions

        catalog.load()
        if checkpoint is None:  # the face stage's model as it is before any training
            config = str(CONFIGS / "quickstart_face.yaml")
            assistant = load_assistant(cfg_path=config, question_processor="blip_caption")
        else:
            assistant = load_assistant(checkpoint)
        columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=len(questions))
            options = GenerateOptions(max_new_tokens=60)
            return answer_questions(
                assistant, questions, options, 64, is_blank, lambda count: progress.advance(task, count)
            )

    def _chat(self, data: str, checkpoint: str) -> str:
        """JSON: the picture of a short chat and its questions and answers."""

        def chat() -> str:
            from minigpt4 import catalog
            from minigpt4.chat.loading import load_assistant
            from minigpt4.chat.session import ChatSession, open_image
            from minigpt4.models.generation import GenerateOptions

            catalog.load()
            described = json.loads((Path(data) / "test/questions.json").read_text())
            image = next(item["image"] for item in described if item["type"] == "full description")
            session = ChatSession(load_assistant(checkpoint))
            session.set_image(open_image(Path(data) / image))
            turns = [
                (question, session.ask(question, GenerateOptions(max_new_tokens=60))) for question in CHAT_QUESTIONS
            ]
            return json.dumps({"image": str(Path(data) / image), "turns": turns})

        return self.steps.run("chat", "One chat", [checkpoint, data, *CHAT_QUESTIONS], chat)

    def _report(self, by_type: Any, photos: Any, chat: Any, checkpoints: dict[str, str]) -> None:
        seconds, cpu_seconds = self.steps.totals()
        results = {
            "mean_accuracy": _mean(by_type, "accuracy"),
            "mean_blank_image": _mean(by_type, "blank_image"),
            "mean_untrained": _mean(by_type, "untrained"),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "by_type": by_type,
            "photos": photos,
            "checkpoints": checkpoints,
        }
        write_atomically(self.out / "results.json", json.dumps(results, indent=1))
        self.console.print()
        self.console.print(_table(by_type, results))
        low, high = photos["interval"]
        self.console.print(
            f"Photographs, human or not (n={photos['n']}): {photos['accuracy']:.2f} "
            f"(95 % interval {low:.2f} to {high:.2f}); majority answer {photos['majority']:.2f}, "
            f"before fine-tuning {photos['before']:.2f}",
            highlight=False,
        )
        self.console.print(f"\n{_shown(chat['image'])}", highlight=False)
        for question, answer in chat["turns"]:
            self.console.print(f"  User: {question}\n  MiniGPT-4: {answer}", highlight=False)
        draw_chat(Path(chat["image"]), chat["turns"], self.out / "chat.png")
        draft = self.out / ".results.svg, chat.png"
        self.console.save_svg(str(draft), title="make quickstart", clear=False)
        os.replace(draft, self.out / "results.svg")
        self._where(checkpoints, chat["image"], seconds, cpu_seconds)

    def _where(self, checkpoints: dict[str, str], image: str, seconds: float, cpu_seconds: float) -> None:
        self.console.print(
            f"\nResults      {_shown(self.out / 'results.json')}, results.svg, chat.png"
            f"\nCheckpoint   {_shown(checkpoints['face'])}"
            f"\nTraining log {_shown(Path(checkpoints['face']).parents[1])}: log.txt, training_curve.png"
            f"\nTime         {seconds:.0f} s, {cpu_seconds:.0f} CPU-seconds, without installation"
            "\n\nGo on chatting:\n"
            f"  .venv/bin/python demo_v2_command_line.py --ckpt {_shown(checkpoints['face'])} --image {_shown(image)}",
            highlight=False,
            soft_wrap=True,
        )


def _sources(*modules: str) -> list[str]:
    return [hashlib.sha256((ROOT / "dataset" / f"{name}.py").read_bytes()).hexdigest() for name in modules]


def _by_type(questions: Any, answers: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(question.type for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.type == name]
        references = [questions[i].answer for i in chosen]
        scores[name] = {
            column: exact_accuracy([given[i] for i in chosen], references) for column, given in answers.items()
        }
        scores[name].update(majority=majority_accuracy(references), n=len(chosen))
    return scores


def _mean(by_type: dict[str, dict[str, float]], column: str) -> float:
    return sum(scores[column] for scores in by_type.values()) / len(by_type)


def _table(by_type: dict[str, dict[str, float]], results: dict[str, Any]) -> Table:
    table = Table(title="Exact answers on held-out faces")
    table.add_column("question type")
    columns = ("accuracy", "majority", "blank_image", "untrained")
    for title in ("trained", "majority answer", "blank image", "untrained projection", "n"):
        table.add_column(title, justify="right")
    for name, scores in by_type.items():
        table.add_row(name, *(f"{scores[column]:.2f}" for column in columns), str(int(scores["n"])))
    table.add_section()
    means = (
        results["mean_accuracy"],
        _mean(by_type, "majority"),
        results["mean_blank_image"],
        results["mean_untrained"],
    )
    table.add_row("mean", *(f"{value:.2f}" for value in means), "")
    return table


def _shown(path: str | Path) -> str:
    """A path as one would type it from here."""
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
