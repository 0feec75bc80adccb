"""The folders for transformers: they work without this repository, and their processor is the chat's."""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import HF_MODULES_CACHE

from minigpt4.chat.session import ChatSession
from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.schema import ProcessorConfig
from minigpt4.common.types import IMAGE_TOKEN
from minigpt4.export import hf
from minigpt4.export.example import draw_image
from minigpt4.export.prompt import prompt_format
from minigpt4.export.run import TARGETS, Wishes, export
from minigpt4.export.source import open_source
from minigpt4.export.tokenizer_files import check_tokenizer, export_tokenizer
from minigpt4.models.answer_text import clean_answer
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.minigpt_v2 import MiniGPTv2Config
from minigpt4.processors.base import make_text_processor
from tests.export_parts import LLAMA2, V2, VICUNA, Exports, write_checkpoint
from tests.golden_cases import LLAMA, load_case
from tests.tiny_backbones import FAMILIES, tower_keys, write_llm

CASES = [VICUNA, LLAMA2, V2]
SHORT = GenerateOptions(max_new_tokens=8)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def loaded(exports: Exports) -> Iterator[Any]:
    """case -> (processor, model) of its folder, as a reader gets them."""
    known: dict[str, tuple[Any, Any]] = {}

    def load(case: str) -> tuple[Any, Any]:
        if case not in known:
            folder = exports.folder(case, "hf")
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            known[case] = (processor, AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True))
            hf.forget_remote_code(folder)
        return known[case]

    yield load


def message(text: str, image: Image.Image | None = None) -> dict[str, Any]:
    parts = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def ids_of(processor: Any, conversation: list[dict[str, Any]]) -> list[int]:
    """Ids with IMAGE_TOKEN where the exported code has its own image token."""
    ids = processor.apply_chat_template(conversation, tokenize=True)[0]
    return [IMAGE_TOKEN if i == processor.image_token_id else i for i in ids]


def session_of(exports: Exports, case: str) -> ChatSession:
    return ChatSession(exports.assistant(case))


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_gets_the_ids_of_the_chat(exports: Exports, loaded: Any, case: str) -> None:
    processor, _ = loaded(case)
    session, image = session_of(exports, case), draw_image(1)
    session.set_image(image)
    turn, first = session._fitting_prompt("Is this (he) HAPPY?  Why...", SHORT)
    conversation = [message("Is this (he) HAPPY?  Why...", image)]
    assert ids_of(processor, conversation) == first.ids
    session._remember(turn, "No, <ImageHere>he is sad.")
    conversation += [{"role": "assistant", "content": "No, <ImageHere>he is sad."}, message("Are you sure?")]
    assert ids_of(processor, conversation) == session._fitting_prompt("Are you sure?", SHORT)[1].ids
    session.reset()
    assert ids_of(processor, [message("Hello!")]) == session._fitting_prompt("Hello!", SHORT)[1].ids
    session.add_image(image)
    session.add_image(image)
    two = {"role": "user", "content": [*message("Same?", image)["content"][:1], *message("Same?", image)["content"]]}
    assert ids_of(processor, [two]) == session._fitting_prompt("Same?", SHORT)[1].ids


def test_the_published_format_of_minigpt_v2_is_exported_when_it_is_chosen(exports: Exports, loaded: Any) -> None:
    assistant = replace(exports.assistant(V2), template="minigpt_v2_legacy")
    processor = copy.copy(loaded(V2)[0])
    processor.prompt_format = prompt_format(assistant)
    ids = ids_of(processor, [message("Who?", draw_image(0))])
    assert ids == ChatSession.first_prompt(assistant, "Who?").ids and ids[:2] == [1, 1]


@pytest.mark.parametrize("case", CASES)
def test_pictures_of_any_mode_get_the_pixels_of_training(exports: Exports, loaded: Any, case: str) -> None:
    processor, _ = loaded(case)
    image_processor = exports.assistant(case).image_processor
    pictures = [draw_image(0), draw_image(1).convert("L"), draw_image(2).convert("RGBA"), draw_image(3).convert("P")]
    expected = torch.stack([image_processor(picture) for picture in pictures])
    assert torch.equal(processor.pixels(pictures), expected)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_chat_also_in_a_batch(exports: Exports, loaded: Any, case: str) -> None:
    processor, model = loaded(case)
    session, image = session_of(exports, case), draw_image(4)
    questions = ["What?", "Is there a person in the picture, and what does the face express?"]
    expected = []
    for question in questions:
        session.set_image(image)
        expected.append(session.ask(question, SHORT))
    inputs = processor.apply_chat_template(
        [[message(question, image)] for question in questions], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape and len(inputs["pixel_values"]) == 2
    stop = {"stop_strings": processor.stop or None, "tokenizer": processor.tokenizer}
    answers = model.generate(**inputs, max_new_tokens=8, **stop).tolist()
    # Untrained models say bytes that are no text, which tokenizers spell in different ways: ours spells both here.
    texts = [session.assistant.model.encoder.tokenizer.decode(row) for row in answers]
    assert [clean_answer(text, processor.stop) for text in texts] == expected


def test_the_exported_cleaning_of_questions_is_ours(loaded: Any) -> None:
    processor, _ = loaded(V2)
    ours = make_text_processor(ProcessorConfig(name="blip_caption"))
    texts = ["U.S. (3.5)!", "  What?\n", "a\nb\tc", "#x~y*", "word " * 60, "", "\n \n"]
    assert [processor.clean(text) for text in texts] == [ours(text) for text in texts]
    assert loaded(LLAMA2)[0].clean("As IT (is).") == "As IT (is)."


def test_rendered_text_is_taken_as_it_is_and_images_are_counted(exports: Exports, loaded: Any) -> None:
    processor, model = loaded(V2)
    text = "[INST] <Img><ImageHere></Img> and <Img><ImageHere></Img> differ?  [/INST]"
    inputs = processor(text=text, images=[draw_image(0), draw_image(1)], return_tensors="pt")
    wanted = exports.model(V2).encoder.encode_text(text).ids
    ids = inputs["input_ids"][0].tolist()
    assert [IMAGE_TOKEN if i == processor.image_token_id else i for i in ids] == wanted
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
        with pytest.raises(ValueError, match="32 image positions, pixel_values fill 16"):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
        with pytest.raises(ValueError, match="32 image positions, pixel_values fill 0"):
            model.generate(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="the text holds 2 x <ImageHere>, 1 images are given"):
        processor(text=text, images=draw_image(0))
    with pytest.raises(ValueError, match="a question must not hold <ImageHere>"):
        processor.apply_chat_template([message("<ImageHere>?")])
    with pytest.raises(ValueError, match="the last message must be the user's"):
        processor.apply_chat_template([{"role": "assistant", "content": "Yes."}])


def test_the_exported_model_trains(loaded: Any) -> None:
    processor, model = loaded(V2)
    inputs = processor.apply_chat_template(
        [message("What?", draw_image(0))], tokenize=True, return_dict=True, return_tensors="pt"
    )
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    model(**inputs, labels=labels).loss.backward()
    for parameter in (model.projection.weight, model.get_input_embeddings().weight, model.ln_vision.weight):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_cut_as_in_the_chat(exports: Exports, loaded: Any, case: str) -> None:
    processor, _ = loaded(case)
    tokenizer = exports.model(case).encoder.tokenizer
    for text in ("Assistant: a sad face", " two  spaces ", "[INST] q [/INST] yes ### no", "caf\u00e9</s> and more"):
        ids = tokenizer.encode(text)
        kept = ids[: ids.index(2)] if 2 in ids else ids
        expected = clean_answer(tokenizer.decode(kept), processor.stop)
        assert processor.post_process_image_text_to_text(torch.tensor([ids])) == [expected]


def run_alone(code: str, folder: Path) -> str:
    """Output of a program that knows the folder and installed packages, not this repository."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    blocked = "import sys\nsys.modules['minigpt4'] = None\n"  # importing it would fail
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_exported_code_imports_torch_and_transformers_alone() -> None:
    for file in hf.REMOTE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            known = {"torch", "transformers", *sys.stdlib_module_names}
            assert {name.split(".")[0] for name in names} <= known, file.name


def program_of(folder: Path, ids: str) -> str:
    """The program in the README of an export, for a short answer; its last line is the ids of the answer."""
    program = max(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S), key=len)
    program = program.replace("path/to/this/folder", str(folder)).replace("max_new_tokens=100", "max_new_tokens=8")
    return f"{program}print({ids}.tolist())\n"


def spelled(exports: Exports, case: str, shown: str) -> str:
    """The answer that ids spell, by our tokenizer: bytes that are no text have no common spelling."""
    ids = json.loads(shown.strip().splitlines()[-1])
    return clean_answer(exports.model(case).encoder.tokenizer.decode(ids), exports.assistant(case).stopping(SHORT).stop)


def answer_of(exports: Exports, case: str, image: Path, question: str) -> str:
    session = session_of(exports, case)
    session.set_image(Image.open(image))
    return session.ask(question, SHORT)


@pytest.mark.slow  # another interpreter that imports torch and transformers
def test_the_folder_answers_without_this_repository(exports: Exports, tmp_path: Path) -> None:
    draw_image(5).save(tmp_path / "face.png")
    shown = run_alone(program_of(exports.folder(LLAMA2, "hf"), "ids[0]"), tmp_path)
    answer = answer_of(exports, LLAMA2, tmp_path / "face.png", "What does the face express?")
    assert spelled(exports, LLAMA2, shown) == answer != ""


def test_the_readme_of_a_blip2_folder_puts_the_image_in_its_place(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_image(5).save(tmp_path / "face.png")
    monkeypatch.chdir(tmp_path)
    folder = exports.folder(VICUNA, "blip2")
    capsys.readouterr()
    exec(compile(program_of(folder, "answer"), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    answer = answer_of(exports, VICUNA, tmp_path / "face.png", "Is there a person in the picture?")
    assert spelled(exports, VICUNA, shown) == answer != ""


@pytest.mark.parametrize("name", ["my-model.v2", "2026_faces"])
def test_no_copy_of_the_code_stays_in_the_user_s_cache(exports: Exports, tmp_path: Path, name: str) -> None:
    export(exports.source(V2), TARGETS["hf"], Wishes(tmp_path / name))
    modules = Path(HF_MODULES_CACHE) / "transformers_modules"
    assert not list(modules.glob(f"*_dot_writing_hyphen_{os.getpid()}"))


def test_the_exported_code_is_part_of_the_package() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["minigpt4"]
    package = hf.REMOTE.parents[1]
    shipped = {file for pattern in patterns for file in package.glob(pattern)}
    assert len(list(hf.REMOTE.glob("*.py"))) == 2 and set(hf.REMOTE.glob("*.py")) <= shipped


def test_a_processor_with_other_ids_or_pixels_is_found(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hf.processor_config
    for change, text in (({"image_mean": [0.5, 0.5, 0.5]}, "other pixels"), ({"question_text": "identity"}, "the ids")):
        monkeypatch.setattr(hf, "processor_config", lambda *given, change=change: {**right(*given), **change})
        with pytest.raises(CheckpointError, match=f"the exported processor gives {text}"):
            export(exports.source(V2), TARGETS["hf"], Wishes(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_questions_that_go_through_a_plugin_cannot_be_exported(exports: Exports, tmp_path: Path) -> None:
    source = replace(exports.source(V2), question_processor="mine")
    with pytest.raises(ConfigError, match="questions go through 'mine', .* identity, blip_caption"):
        export(source, TARGETS["hf"], Wishes(tmp_path / "out"))


def test_an_eva_tower_with_parts_transformers_lacks_is_refused(exports: Exports, tmp_path: Path) -> None:
    source = exports.source(V2)
    cfg = replace(source.model, vit_config={**source.model.vit_config, "swiglu_mlp": True})
    with pytest.raises(ConfigError, match="'swiglu_mlp' makes a tower that transformers' EVA cannot be"):
        export(replace(source, config=replace(source.config, model=cfg)), TARGETS["hf"], Wishes(tmp_path / "out"))


def tiny_qwen(folder: Path) -> None:
    """A language model with a byte-level tokenizer, no BOS, and one matrix for input and output."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    pipeline: Any = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pipeline.train_from_iterator(
        ["what does the face express"] * 3,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token=special[1], pad_token=special[0]).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    cfg = Qwen2Config(vocab_size=320, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, **sizes, **heads)
    Qwen2ForCausalLM(cfg).to(torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize(("tower", "side"), [("vit_tiny_patch16_224", 64), ("eva02_tiny_patch14_224", 56)])
def test_another_tower_and_another_language_model_are_exported(tmp_path: Path, tower: str, side: int) -> None:
    tiny_qwen(tmp_path / "qwen")
    cfg = MiniGPTv2Config(
        image_size=side,
        vit_model=tower,  # the second one has rotary positions, a buffer that is in no file
        vit_config={"depth": 2, "embed_dim": 48, "num_heads": 2},
        vit_weights="random",
        llama_model=str(tmp_path / "qwen"),
        lora_r=2,
        lora_target_modules=["q_proj", "up_proj"],
        end_sym="<|endoftext|>",  # one id, but not the tokenizer's end of sequence
        chat_template=True,
    )
    model = registry.get("model", "minigpt_v2").from_config(cfg, torch.device("cpu"), torch.float32)
    checkpoint = write_checkpoint(tmp_path / "job", cfg, model.trainable_state())
    source = open_source(str(checkpoint), None)
    export(source, TARGETS["hf"], Wishes(tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [1, 0]
    assert config["dtype"] == "bfloat16" and config["timm_config"]["name"] == tower
    if side == 64:
        export(source, TARGETS["merged"], Wishes(tmp_path / "merged", dtype="float32"))


@pytest.mark.parametrize(
    ("tower", "language_model", "group"), [("siglip", "gemma", 1), ("dinov2_registers", "qwen2", 4)]
)
def test_a_tokenizers_chat_template_and_another_grouping_are_exported(
    tmp_path: Path, tower: str, language_model: str, group: int
) -> None:
    cfg = MiniGPTv2Config(
        llama_model=str(write_llm(tmp_path / "llm", FAMILIES[language_model])), lora_r=2, prompt_template="tokenizer",
        end_sym="auto", vision_tokens_per_position=group, **tower_keys(tower),
    )  # fmt: skip
    model = registry.get("model", "minigpt_v2").from_config(cfg, torch.device("cpu"), torch.float32)
    checkpoint = write_checkpoint(tmp_path / "job", cfg, model.trainable_state())
    source, folder = open_source(str(checkpoint), None), tmp_path / "hf"
    export(source, TARGETS["hf"], Wishes(folder))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    hf.forget_remote_code(folder)
    session, image = ChatSession(source.load()), draw_image(1)
    session.set_image(image)
    turn, first = session._fitting_prompt("Who?", SHORT)
    assert ids_of(processor, [message("Who?", image)]) == first.ids
    session._remember(turn, "A cat.")
    conversation = [message("Who?", image), {"role": "assistant", "content": "A cat."}, message("Sure?")]
    assert ids_of(processor, conversation) == session._fitting_prompt("Sure?", SHORT)[1].ids
    rendered = processor.apply_chat_template(conversation[:1])
    ids = processor(images=[image], text=rendered)["input_ids"][0]
    assert [IMAGE_TOKEN if i == processor.image_token_id else i for i in ids] == first.ids


def test_a_tokenizer_with_other_ids_is_found() -> None:
    from transformers import AutoTokenizer

    from minigpt4.conversation.tokenizer import load_tokenizer

    ours = load_tokenizer(str(LLAMA))
    check_tokenizer(export_tokenizer(str(LLAMA), ours), ours, "ours")
    with pytest.raises(CheckpointError, match="AutoTokenizer gives .* the model was trained with"):
        check_tokenizer(AutoTokenizer.from_pretrained(LLAMA), ours, "AutoTokenizer")


@pytest.mark.parametrize("vocabulary", ["tok", "tok_dollar"])
def test_the_exported_tokenizer_has_the_recorded_ids(vocabulary: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from minigpt4.conversation.tokenizer import load_tokenizer

    golden = LLAMA.parent / "tokenizer"
    ours = load_tokenizer(str(golden / vocabulary))
    export_tokenizer(str(golden / vocabulary), ours).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rows = json.loads((golden / "tokenizer.json").read_text())[vocabulary]["rows"]
    assert len(rows) > 50
    for row in rows:
        assert theirs.encode(row["text"], add_special_tokens=False) == row["ids"]
        assert theirs.encode(row["text"]) == row["ids_special"]
        assert theirs.decode(row["ids"], skip_special_tokens=True) == ours.decode(row["ids"])


def test_the_case_names_are_the_recorded_ones() -> None:
    assert [load_case(case).meta["model"]["arch"] for case in CASES] == ["minigpt4", "minigpt4", "minigpt_v2"]
