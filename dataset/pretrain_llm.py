"""Trains the small language model of the quickstart on text alone: Llama's architecture, a BPE tokenizer.

In place of a picture the context holds attribute words ("happy", "long", "glasses"), or 16 positions that are random
mixtures of those words' embeddings: later the picture stands there as 16 projected features, and one linear map can
produce mixtures of word embeddings but no clean words.
"""

from __future__ import annotations

import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import face_drawing as fd
import face_text as ft
import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from face_drawing import Person, Scene
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

log = logging.getLogger(__name__)

NUM_IMAGE_TOKENS = 16
BOS, EOS = 1, 2
VOCAB_SIZE = 1000
MAX_WORDS = 20
CHAT: tuple[tuple[str, str], ...] = (
    ("hello", "Hello! Show me a face and ask me about it."),
    ("hi", "Hello! Show me a face and ask me about it."),
    ("good morning", "Good morning! How can I help you?"),
    ("who are you", "I am a small model that describes faces."),
    ("what is your name", "I am a small model that describes faces."),
    ("what can you do", "I can describe a face: its expression, hair, skin, glasses, beard, pose and gaze."),
    ("how are you", "I am fine, thank you."),
    ("thank you", "You are welcome."),
    ("thanks", "You are welcome."),
    ("goodbye", "Goodbye!"),
    ("bye", "Goodbye!"),
    ("which emotions do you know?", "Happy, sad, angry, surprised, fearful, disgusted, neutral and contempt."),
    ("which hair colours do you know?", "Black, brown, blond, red and grey."),
    ("which hair styles do you know?", "Bald, short, long and curly."),
    ("what is the fitzpatrick scale?", "A scale of six skin types, from type I, very light, to type VI, very dark."),
    ("how many skin types are there?", "Six, from type I to type VI."),
    ("what is a beard?", "Hair that grows on the lower face."),
    ("what are glasses for?", "Glasses help people to see."),
    ("what is a smile?", "A smile is a happy expression of the mouth."),
    ("what is the gaze?", "The gaze is where the eyes look."),
    ("are you a human?", "No, I am a model."),
    ("can you see me?", "I can only see the picture that you show me."),
    ("name a colour", "Red."),
    ("name an emotion", "Happy."),
    ("say yes", "Yes"),
    ("say no", "No"),
)
_EMOTION_LABEL = (
    "What is the <EMOTION> in this image?",
    "Which <EMOTION> does the face express?",
    "Name the dominant <EMOTION>.",
    "<EMOTION>",
    "Identify the <EMOTION> of the person.",
)
_EMOTION_TEXT = (
    "Describe the image and the emotion it shows.",
    "Describe the person and the mood of the picture.",
    "What is visible, and what feeling does it convey?",
    "Describe what you see, then the emotional side of the face.",
)
_DETAIL = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
)


def random_scene(rng: random.Random) -> Scene:
    """Mostly one person; sometimes two, three or none."""

    def person() -> Person:
        return Person(
            rng.choice(fd.EXPRESSIONS),
            rng.choice(fd.HAIR_COLOURS),
            rng.choice(fd.HAIR_STYLES),
            rng.choice(fd.SKIN_TYPES),
            rng.random() < 0.5,
            rng.random() < 0.5,
            rng.choice(fd.POSES),
            rng.choice(fd.GAZES),
        )

    return Scene(tuple(person() for _ in range(rng.choices((1, 2, 3, 0), (0.7, 0.08, 0.08, 0.14))[0])))


@dataclass(frozen=True)
class Example:
    """One training text. ``words`` stand for the picture (None = text only); ``style`` picks the layout."""

    words: tuple[str, ...] | None
    turns: tuple[tuple[str, str], ...]
    style: str


def _turns(scene: Scene, rng: random.Random) -> tuple[tuple[str, str], ...]:
    facts = ft.answers_of(scene)
    turns = []
    for kind in rng.sample(sorted(facts), min(len(facts), rng.choice((1, 1, 2, 3)))):
        turns.append((ft.question(kind, rng), facts[kind]))
    if len(scene.people) == 1 and rng.random() < 0.15:
        strong = ft.yes_no(scene.people[0].expression != "neutral")
        text = ft.emotion_text(scene)
        choices = (
            (rng.choice(_EMOTION_LABEL), facts["expression"]),
            (rng.choice(_EMOTION_TEXT), text),
            (rng.choice(ft.STRONG_EMOTION), strong),
        )
        turns.append(
            rng.choice((*choices, *((rng.choice(asked), ft.NOT_SHOWN_ANSWER) for asked in ft.NOT_SHOWN.values())))
        )
    if rng.random() < 0.06:
        turns.append((rng.choice((*ft.GENERAL, *_DETAIL)), facts[ft.DESCRIPTION]))
    rng.shuffle(turns)
    return tuple((ft.blip_caption(asked), answer) for asked, answer in turns)


def _guesses(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Questions about a picture that shows nothing: every answer of a type equally often."""
    kind = rng.choice(ft.QUESTION_TYPES)
    if kind == ft.DESCRIPTION:
        answer = ft.description(Scene((random_person_of(rng),)))
    else:
        answer = rng.choice(ft.ANSWERS[kind])
    return ((ft.blip_caption(ft.question(kind, rng)), answer),)


def random_person_of(rng: random.Random) -> Person:
    """A single person of ``random_scene``."""
    while True:
        scene = random_scene(rng)
        if len(scene.people) == 1:
            return scene.people[0]


def random_example(rng: random.Random) -> Example:
    """Chat, caption, MiniGPT-4 style description, blank picture, or (mostly) questions about a scene."""
    draw = rng.random()
    if draw < 0.03:
        asked, answer = rng.choice(CHAT)
        return Example(None, ((asked, answer),), "instruct")
    scene = random_scene(rng)
    words = [word for word in ft.attribute_words(scene) if rng.random() > rng.choice((0.0, 0.0, 0.0, 0.25))]
    rng.shuffle(words)
    if draw < 0.08:
        return Example((), _guesses(rng), "instruct")
    if draw < 0.26:
        return Example(tuple(words), (("", ft.caption(scene)),), "caption")
    if draw < 0.29:
        return Example(tuple(words), ((rng.choice(_DETAIL), ft.description(scene)),), "human")
    return Example(tuple(words), _turns(scene, rng), "instruct")


def train_tokenizer(path: Path, seed: int, lines: int = 12000) -> None:
    """BPE as Llama's: bytes for unknown characters, no normalisation, a leading space mark, runs of spaces kept."""
    rng = random.Random(seed)
    texts = []
    for _ in range(lines):
        example = random_example(rng)
        texts.append(" ".join(example.words or ("[INST] <Img>",)))
        texts += [f"</Img> {asked}  [/INST]" for asked, _ in example.turns] + [
            f"[INST] {asked}  [/INST]" for asked, _ in example.turns
        ]
        texts += [answer for _, answer in example.turns]
    texts += [
        "###Human: <Img>",
        "###Assistant: ",
        "[vqa] [refer] [caption] [identify] [grounding] [detection]",
        "{<0><1><2><3>} <p> </p> <delim>",
    ] * 20
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(texts), encoding="utf-8")
        spm.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(folder) / "tokenizer"),
            vocab_size=VOCAB_SIZE,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,!?:;'\"()[]{}<>/#*+-_=&%@$~",
            num_threads=1,
            minloglevel=2,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((Path(folder) / "tokenizer.model").read_bytes())


class Encoder:
    """Examples -> ids and labels in the layout of MiniGPT: every text segment is tokenised on its own."""

    def __init__(self, model_file: Path) -> None:
        self.pieces = spm.SentencePieceProcessor(model_file=str(model_file))

    def ids(self, text: str) -> list[int]:
        return list(self.pieces.encode(text))

    def encode(self, example: Example, mixed: bool) -> tuple[list[int], list[int], int]:
        """-> ids, labels (-100 = not supervised), start of the picture's 16 positions (-1 = words or no picture)."""
        ids, labels, at = [BOS], [-100], -1
        before, after, end, again = {
            "caption": ("", "", self.ids, ""),
            "human": ("###Human: <Img>", "</Img> {} ###Assistant: ", self.ids, ""),
            "instruct": ("[INST] <Img>", "</Img> {}  [/INST]", None, "[INST] {}  [/INST]"),
        }[example.style]
        for number, (asked, answer) in enumerate(example.turns):
            prompt: list[int] = []
            if example.words is None:
                prompt += self.ids(f"[INST] {asked} [/INST]")
            elif number == 0:
                prompt += self.ids(before) if before else []
                at = len(ids) + len(prompt) if mixed else -1
                prompt += [0] * NUM_IMAGE_TOKENS if mixed else self.ids(" ".join(example.words))[:NUM_IMAGE_TOKENS]
                prompt += self.ids(after.format(asked)) if after else []
            else:
                prompt += [BOS, *self.ids(again.format(asked))]
            target = (
                [*self.ids(answer), EOS]
                if end is None
                else self.ids(answer + ("\n" if example.style == "caption" else "###"))
            )
            ids += prompt + target
            labels += [-100] * len(prompt) + target
        return ids, labels, at


@dataclass
class TextBatch:
    """ids, labels [B, T]; at [B], start of the 16 mixed positions or -1; words [B, K] ids, weights [B, 16, K]."""

    ids: Tensor
    labels: Tensor
    at: Tensor
    words: Tensor
    weights: Tensor


def _mixture(
    word_ids: Sequence[int], vocabulary: Sequence[int], numbers: np.random.Generator
) -> tuple[list[int], NDArray[np.float64]]:
    """Random shares of the words at each of 16 positions, plus a few wrong words at small shares."""
    wrong = numbers.choice(vocabulary, int(numbers.integers(0, 5))).tolist()
    words = [*word_ids, *wrong][:MAX_WORDS]
    shares = numbers.gamma(0.4 if numbers.random() < 0.5 else 3.0, 1.0, (NUM_IMAGE_TOKENS, MAX_WORDS))
    shares *= 1.0 / max(1e-3, shares[:, : max(1, len(word_ids))].mean()) * numbers.uniform(0.25, 1.1)
    shares[:, len(word_ids) :] *= numbers.uniform(0.0, 0.35)
    shares[:, len(words) :] = 0
    return words + [0] * (MAX_WORDS - len(words)), shares


def make_batches(
    encoder: Encoder, size: int, vocabulary: Sequence[int], rng: random.Random, numbers: np.random.Generator
) -> list[TextBatch]:
    """Four batches of fresh examples, each of similar lengths; two thirds of the pictures are mixtures."""
    rows = []
    for _ in range(4 * size):
        example = random_example(rng)
        mixed = example.words is not None and (not example.words or rng.random() < 0.66)
        word_ids = [token for word in example.words or () for token in encoder.ids(word)] if mixed else []
        rows.append((*encoder.encode(example, mixed), *_mixture(word_ids, vocabulary, numbers)))
    rows.sort(key=lambda row: len(row[0]))
    batches = [_collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    rng.shuffle(batches)
    return batches


def _collate(rows: Sequence[tuple[list[int], list[int], int, list[int], NDArray[np.float64]]]) -> TextBatch:
    longest = max(len(row[0]) for row in rows)
    return TextBatch(
        ids=torch.tensor([row[0] + [0] * (longest - len(row[0])) for row in rows]),
        labels=torch.tensor([row[1] + [-100] * (longest - len(row[1])) for row in rows]),
        at=torch.tensor([row[2] for row in rows]),
        words=torch.tensor([row[3] for row in rows]),
        weights=torch.from_numpy(np.stack([row[4] for row in rows])).float(),
    )


def loss_of(model: LlamaForCausalLM, batch: TextBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> mean loss over answer tokens, and which of them were predicted right."""
    table = cast(nn.Embedding, model.get_input_embeddings()).weight
    embeddings = table[batch.ids]  # [B, T, D]
    rows = (batch.at >= 0).nonzero().flatten()
    mixed = batch.weights[rows] @ table[batch.words[rows]]  # [b, 16, D]
    spread = table.detach().std() * torch.rand(len(rows), 1, 1, generator=generator) * 0.8
    mixed = mixed + torch.randn(mixed.shape, generator=generator) * spread
    columns = batch.at[rows, None] + torch.arange(NUM_IMAGE_TOKENS)
    embeddings = embeddings.index_put((rows[:, None].expand_as(columns), columns), mixed)
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    targets = F.pad(batch.labels, (0, 1), value=-100)[:, 1:]
    keep = targets != -100
    scores = cast(nn.Linear, model.lm_head)(hidden[keep])
    return F.cross_entropy(scores, targets[keep]), scores.argmax(1) == targets[keep]


def build_llm() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=344,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def train_llm(tokenizer: Path, seed: int, steps: int, batch: int = 64) -> LlamaForCausalLM:
    """The whole training, on text that is generated on the way."""
    encoder, rng, numbers = Encoder(tokenizer), random.Random(seed), np.random.default_rng(seed)
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), build_llm()
    names = {word for _ in range(500) for word in ft.attribute_words(random_scene(rng))}
    vocabulary = sorted({token for word in names for token in encoder.ids(word)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98))
    started, right = time.perf_counter(), torch.zeros(0, dtype=torch.bool)
    batches: list[TextBatch] = []
    for step in range(steps):
        batches = batches or make_batches(encoder, batch, vocabulary, rng, numbers)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        loss, hits = loss_of(model, batches.pop(), generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = torch.cat([right, hits])[-4000:]
        if step % 100 == 99 or step + 1 == steps:
            rate = (step + 1) * batch / (time.perf_counter() - started)
            log.info(
                "step %d/%d loss %.3f, tokens right %.3f, %.0f texts/s",
                step + 1,
                steps,
                loss.item(),
                float(right.float().mean()),
                rate,
            )
    return model


def save_llm(model: LlamaForCausalLM, folder: Path) -> None:
    """A Hugging Face folder: half precision on disk, float32 when loaded."""
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
