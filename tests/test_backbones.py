"""The shipped backbones load, are small, and speak the layout that fine-tuning uses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from torch import nn
from transformers import LlamaForCausalLM

from minigpt4 import catalog
from minigpt4.common.config import load_config
from minigpt4.conversation.tokenizer import load_tokenizer
from minigpt4.models.llm import build_llm
from minigpt4.models.vision import build_vision

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "dataset" / "quickstart" / "backbones"


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "llm" / "tokenizer.model"))


@pytest.fixture(scope="module")
def llm() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER / "llm").eval()


def _answer(llm: LlamaForCausalLM, pieces: sentencepiece.SentencePieceProcessor, segments: list[str]) -> str:
    ids = torch.tensor([[1, *(token for segment in segments for token in pieces.encode(segment))]])
    out = llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    return str(pieces.decode(out[0, ids.shape[1] :].tolist()))


def test_our_own_loaders_take_both_backbones_whole() -> None:
    catalog.load()
    cfg = load_config(ROOT / "train_configs" / "quickstart_stage1.yaml", check_data=False).model
    tower, _, tower_report = build_vision(cfg, torch.device("cpu"), torch.float32)
    _, llm_report = build_llm(cfg, torch.device("cpu"), torch.float32)
    assert tower_report is not None and llm_report is not None
    assert tower_report.parts() == {"visual_encoder": {"loaded": len(tower.state_dict())}}
    assert set(llm_report.parts()["llama_model"]) == {"loaded"}
    assert not tower_report.warnings() and not llm_report.warnings()


def test_vision_tower_loads_strictly_into_timm_eva() -> None:
    tower = Eva(
        img_size=64,
        patch_size=8,
        num_classes=0,
        global_pool="",
        embed_dim=128,
        depth=4,
        num_heads=4,
        mlp_ratio=4.3637,
        qkv_bias=True,
        qkv_fused=True,
        use_post_transformer_norm=False,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    tower.load_state_dict(load_file(FOLDER / "vit.safetensors"), strict=True)
    assert tower(torch.zeros(1, 3, 64, 64)).shape == (1, 65, 128)


def test_backbones_together_stay_under_eight_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 8_000_000


def test_language_model_loads_in_float32_with_the_tokenizers_vocabulary(
    llm: LlamaForCausalLM, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    assert llm.dtype == torch.float32
    assert llm.config.vocab_size == pieces.vocab_size()
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2)


@pytest.mark.parametrize(
    "text", ["[INST] <Img>", "</Img> is this a face?  [/INST]", "Type IV", "été 😀\n", "{<10><20>}"]
)
def test_text_survives_the_vocabulary_and_both_tokenizers_agree(
    pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert load_tokenizer(str(FOLDER / "llm")).encode(text) == ids


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what is the facial expression of the person?", "Sad"),
        ("what is the hair colour of the person?", "Grey"),
        ("does the person wear glasses?", "Yes"),
        ("which way is the head turned?", "Left"),
    ],
)
def test_language_model_reads_the_answer_from_attribute_words(
    llm: LlamaForCausalLM, pieces: sentencepiece.SentencePieceProcessor, question: str, answer: str
) -> None:
    words = "person one sad grey long glasses shaven headleft eyesahead skinIV"
    assert _answer(llm, pieces, ["[INST] <Img>", words, f"</Img> {question}  [/INST]"]) == answer


def test_language_model_greets(llm: LlamaForCausalLM, pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert _answer(llm, pieces, ["[INST] hello [/INST]"]).startswith("Hello!")
