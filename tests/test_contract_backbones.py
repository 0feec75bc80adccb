"""What holds for every language model, vision tower and architecture that YAML can name.

Each family is built from a real config with tiny sizes and random weights, and a tokenizer with the family's special
tokens and chat template.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt4 import catalog
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.types import IMAGE_PROMPT, Batch, Encoded, Turn
from minigpt4.conversation.chat_template import conversation
from minigpt4.models.base_model import BaseModel
from minigpt4.models.generation import GenerateOptions, GenerationMixin
from minigpt4.models.minigpt_v2 import MiniGPTv2, MiniGPTv2Config
from tests.golden_cases import packed, padded
from tests.tiny_backbones import FAMILIES, TOWERS, tower_keys, write_llm, write_tokenizer

CPU = torch.device("cpu")
SAMPLES = (
    [Turn(f"{IMAGE_PROMPT} What is this? ", "A small cat.")],
    [Turn("Who? ", "You.")],
    [Turn(f"{IMAGE_PROMPT} What colour is it? ", "It is grey."), Turn("Sure? ", "Sure.")],
)
Build = Callable[..., GenerationMixin]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The real classes; one thread, for speed and so that sums have one order."""
    catalog.load()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a family's language model once."""
    return cache(lambda name: write_llm(tmp_path_factory.mktemp(name), FAMILIES[name]))


@pytest.fixture(scope="module")
def model_of(llm_folder: Callable[[str], Path]) -> Callable[[str], GenerationMixin]:
    """MiniGPT-v2 on a family and a tiny SigLIP, with LoRA that counts; built once, for tests that only read."""

    def build(name: str) -> GenerationMixin:
        family = FAMILIES[name]
        own = {"prompt_template": "tokenizer", "end_sym": "auto"} if family.template else {"end_sym": "auto"}
        cfg = MiniGPTv2Config(
            llama_model=str(llm_folder(name)), lora_r=2, lora_dropout=0.0, lora_target_modules=list(family.lora),
            max_txt_len=80, **own, **tower_keys("siglip"),
        )  # fmt: skip
        model = MiniGPTv2.from_config(cfg, CPU, torch.float32)
        stir(model)
        return model

    return cache(build)


def stir(model: BaseModel) -> None:
    """LoRA starts at zero; random numbers make it part of every result."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters_by_name():
            if ".lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def pictures(model: BaseModel, count: int) -> Tensor:
    side = model.cfg.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def gradients(model: BaseModel, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = model(batch).loss_sum
        loss.backward()
        total += float(loss)
    return total, {name: p.grad.clone() for name, p in model.trainable_parameters_by_name() if p.grad is not None}


def falls(model: BaseModel, batch: Batch, steps: int = 5) -> bool:
    optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters_by_name()], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(batch).loss_sum
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return all(value == value and abs(value) < 1e6 for value in losses) and losses[-1] < 0.95 * losses[0]


def without_cache(model: GenerationMixin, prompt: Encoded, images: Tensor, count: int) -> str:
    """Greedy ids, every step computed anew the way training computes it."""
    ids: list[int] = []
    with torch.no_grad():
        embeddings = model.embed(torch.tensor([prompt.ids]), images, len(images) * model.encoder.num_image_tokens)
        table, head = model._lm.get_input_embeddings(), model._lm.get_output_embeddings()
        for _ in range(count):
            hidden = model.hidden_states(embeddings, torch.zeros(0), (embeddings.shape[1],))
            ids.append(int(head(hidden[0, -1]).argmax()))
            if ids[-1] in (model.encoder.tokenizer.eos_id, *model.encoder.stop_ids):
                ids.pop()
                break
            embeddings = torch.cat([embeddings, table(torch.tensor([ids[-1:]]))], dim=1)
    return model.encoder.tokenizer.decode(ids).strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_of_text_are_those_of_transformers(
    name: str, model_of: Callable[[str], GenerationMixin]
) -> None:
    model = model_of(name)
    sample = model.encoder.encode_turns([Turn("What is this? ", "A small cat."), Turn("Sure? ", "It is grey.")])
    batch = padded([sample], torch.zeros(0, 3, 1, 1))
    ours, our_grads = gradients(model, [batch])
    model.zero_grad(set_to_none=True)
    theirs = model.llama_model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
    (theirs * batch.num_target_tokens).backward()
    assert ours == pytest.approx(float(theirs) * batch.num_target_tokens, rel=1e-5)
    compared = 0
    for key, parameter in model.trainable_parameters_by_name():
        if ".lora_" in key:
            torch.testing.assert_close(our_grads[key], parameter.grad, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", FAMILIES)
def test_an_untouched_model_of_transformers_has_the_same_loss(
    name: str, model_of: Callable[[str], GenerationMixin], llm_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model = model_of(name)
    batch = padded([model.encoder.encode_turns([Turn("What is this? ", "It is grey.")])], torch.zeros(0, 3, 1, 1))
    untouched: Any = AutoModelForCausalLM.from_pretrained(llm_folder(name)).eval()
    with torch.no_grad(), model.llama_model.disable_adapter():
        ours = float(model(batch).loss_sum)
        theirs = float(untouched(input_ids=batch.input_ids, labels=batch.labels).loss) * batch.num_target_tokens
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_padded_samples_equal_separate_ones(name: str, model_of: Callable[[str], GenerationMixin]) -> None:
    model = model_of(name)
    samples = [model.encoder.encode_turns(turns) for turns in SAMPLES]
    images = pictures(model, 2)
    alone = [padded(samples[:1], images[:1]), padded(samples[1:2], images[:0]), padded(samples[2:], images[1:])]
    loss, expected = gradients(model, alone)
    for layout in (packed, padded):
        together, found = gradients(model, [layout(samples, images)])
        assert together == pytest.approx(loss, rel=1e-5), layout.__name__
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_the_same_alone_batched_streamed_and_without_cache(
    name: str, model_of: Callable[[str], GenerationMixin]
) -> None:
    model = model_of(name)
    images = pictures(model, 1)
    prompts = [model.encoder.encode_prompt([], turns[0].prompt) for turns in SAMPLES[:2]]
    options = GenerateOptions(max_new_tokens=6, stop=model.encoder.stop_texts)
    batched = model.generate(prompts, images, options)
    alone = [model.generate([prompts[0]], images, options)[0], model.generate([prompts[1]], images[:0], options)[0]]
    assert batched == alone and any(batched)
    assert "".join(model.generate_stream(prompts[0], images, options)) == alone[0]
    assert without_cache(model, prompts[0], images, 6) == alone[0]


def test_an_answer_ends_at_every_end_token_of_the_model(model_of: Callable[[str], GenerationMixin]) -> None:
    model, images = copy.copy(model_of("llama3")), pictures(model_of("llama3"), 1)
    prompt = model.encoder.encode_prompt([], SAMPLES[0][0].prompt)
    ids: list[int] = model._run(*model._left_padded([prompt], images), GenerateOptions(max_new_tokens=6))[0].tolist()
    tokenizer: Any = copy.copy(model.encoder.tokenizer)
    tokenizer.end_ids = (tokenizer.eos_id, ids[3])
    model._encoder = replace(model.encoder, tokenizer=tokenizer)
    expected = tokenizer.decode(ids[: ids.index(ids[3])]).strip()
    assert model.generate([prompt], images, GenerateOptions(max_new_tokens=6)) == [expected]
    assert "".join(model.generate_stream(prompt, images, GenerateOptions(max_new_tokens=6))) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_training_lowers_the_loss_and_a_checkpoint_gives_it_back(
    name: str, model_of: Callable[[str], GenerationMixin]
) -> None:
    untrained = model_of(name)
    model = copy.deepcopy(untrained)
    batch = padded([model.encoder.encode_turns(turns) for turns in SAMPLES], pictures(model, 2))
    assert falls(model, batch)
    other = copy.deepcopy(untrained)
    other.load_weights(model.trainable_state(), "checkpoint", complete=True)
    assert float(other.eval()(batch).loss_sum) == float(model.eval()(batch).loss_sum)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.template])
def test_a_conversation_is_the_tokenizers_own_rendering(
    name: str, model_of: Callable[[str], GenerationMixin], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = model_of(name).encoder
    tokenizer = encoder.tokenizer
    history = [Turn("What is this? ", "A small cat."), Turn(" What colour is it?", "It is grey. ")]
    messages = conversation(["What is this?", "What colour is it?", "Sure?"], ["A small cat.", "It is grey."])
    wanted = tokenizer.encode(tokenizer.render(messages, True))
    assert encoder.encode_prompt(history, "Sure? ").ids == wanted
    trained = encoder.encode_turns([*history, Turn("Sure? ", "Sure.")])
    assert trained.ids[: len(wanted)] == wanted and trained.ids[-1] in (tokenizer.eos_id, *encoder.stop_ids)
    assert trained.ids.count(tokenizer.bos_id) == (0 if tokenizer.bos_id is None else 1)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_the_head_alone_would_give_these_families_another_loss(
    name: str, model_of: Callable[[str], GenerationMixin]
) -> None:
    model = copy.copy(model_of(name))
    batch = padded([model.encoder.encode_turns(SAMPLES[1])], torch.zeros(0, 3, 1, 1))
    right = float(model(batch).loss_sum)
    model.logit_shape = type(model.logit_shape)()
    assert abs(float(model(batch).loss_sum) - right) > 0.1


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_trains_through_the_projection_and_itself(name: str, llm_folder: Callable[[str], Path]) -> None:
    _, size, num_prefix, mean = TOWERS[name]
    cfg = MiniGPTv2Config(llama_model=str(llm_folder("llama3")), lora_r=0, freeze_vit=False, **tower_keys(name))
    model = MiniGPTv2.from_config(cfg, CPU, torch.float32)
    assert model.vision.num_prefix_tokens == num_prefix and model.vision.num_patches == 16
    assert model.image_mean == mean
    images = pictures(model, 2)
    tokens = model.visual_encoder(images)
    assert tokens.shape == (2, num_prefix + 16, 32)
    features = model.vision_features(images)
    assert features.shape == (2, 4, 4 * 32)
    expected = model.ln_vision(tokens)[:, num_prefix : num_prefix + 4].flatten(1)
    torch.testing.assert_close(features[:, 0], expected)
    batch = padded([model.encoder.encode_turns(turns) for turns in SAMPLES], images)
    _, grads = gradients(model.train(), [batch])
    assert set(grads) == {key for key, _ in model.trainable_parameters_by_name()}  # DDP waits for every gradient
    assert falls(model, batch)


@pytest.mark.parametrize("name", ["siglip", "eva02"])
def test_tokens_are_normalised_once(name: str, llm_folder: Callable[[str], Path]) -> None:
    cfg = MiniGPTv2Config(llama_model=str(llm_folder("llama3")), lora_r=0, **tower_keys(name))
    model = MiniGPTv2.from_config(cfg, CPU, torch.float32)
    images = pictures(model, 1)
    tokens = model.ln_vision(model.visual_encoder(images))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(tokens.shape[:2]), atol=1e-5, rtol=0)
    assert isinstance(model.ln_vision, torch.nn.Identity) == model.vision.is_normed == (name == "siglip")


TINY_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "minigpt_v2": {"lora_r": 2, "lora_dropout": 0.0},
    "minigpt4": {
        "q_former_model": "random",
        "num_query_token": 4,
        "qformer_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48
        },
    },
}  # fmt: skip


def architectures() -> list[str]:
    catalog.load()
    return [name for name in registry.names("model") if registry.get("model", name).__module__.startswith("minigpt4.")]


@pytest.mark.parametrize("arch", architectures())
def test_every_registered_architecture_keeps_the_contract(arch: str, llm_folder: Callable[[str], Path]) -> None:
    assert arch in TINY_ARCHITECTURES, f"describe a tiny {arch} in TINY_ARCHITECTURES"
    model_class = registry.get("model", arch)
    cfg = model_class.Config(
        llama_model=str(llm_folder("qwen2")), prompt_template="tokenizer", end_sym="auto", max_txt_len=80,
        **tower_keys("clip"), **TINY_ARCHITECTURES[arch],
    )  # fmt: skip
    model = model_class.from_config(cfg, CPU, torch.float32)
    images = pictures(model, 2)
    features = model.vision_features(images)
    projected = model.project(features)
    assert projected.shape == (2, model.encoder.num_image_tokens, model.hidden_size)
    samples = [model.encoder.encode_turns(turns) for turns in SAMPLES]
    batch = padded(samples, images)
    expected = float(model(batch).loss_sum)
    assert float(model(packed(samples, images)).loss_sum) == pytest.approx(expected, rel=1e-5)
    assert float(model(padded(samples, features)).loss_sum) == pytest.approx(expected, rel=1e-5)
    _, grads = gradients(model, [padded(samples[1:2], images[:0])])
    assert not any(grads[f"llama_proj.{kind}"].any() for kind in ("weight", "bias"))
    assert falls(model, batch)
    other = model_class.from_config(cfg, CPU, torch.float32, seed=5)
    other.load_weights(model.trainable_state(), "checkpoint", complete=True)
    assert float(other.eval()(batch).loss_sum) == float(model.eval()(batch).loss_sum)
    prompts = [model.encoder.encode_prompt([], turns[0].prompt) for turns in SAMPLES[:2]]
    options = GenerateOptions(max_new_tokens=5)
    both = model.generate(prompts, images[:1], options)
    assert both == [
        model.generate([prompts[0]], images[:1], options)[0],
        model.generate([prompts[1]], images[:0], options)[0],
    ]


def test_lora_on_all_linear_layers_leaves_the_head_alone(llm_folder: Callable[[str], Path]) -> None:
    cfg = MiniGPTv2Config(
        llama_model=str(llm_folder("phi3")), lora_r=2, lora_target_modules=["all-linear"], **tower_keys("siglip")
    )
    names = [n for n, _ in MiniGPTv2.from_config(cfg, CPU, torch.float32).trainable_parameters_by_name()]
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if ".lora_" in name}
    assert layers == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_fused_layers_are_listed_when_a_lora_target_is_missing(llm_folder: Callable[[str], Path]) -> None:
    cfg = MiniGPTv2Config(llama_model=str(llm_folder("phi3")), **tower_keys("siglip"))
    with pytest.raises(ConfigError, match=r"'q_proj' is in no layer of .*found: .*qkv_proj.*\[all-linear\]"):
        MiniGPTv2.from_config(cfg, CPU, torch.float32)


def test_ids_without_an_embedding_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = {"lora_r": 0, "end_sym": "auto", **tower_keys("siglip")}
    small = write_llm(tmp_path / "small", FAMILIES["qwen2"], vocab_size=16)
    with caplog.at_level("WARNING"):
        MiniGPTv2.from_config(MiniGPTv2Config(llama_model=str(small), **keys), CPU, torch.float32)
    assert not caplog.records
    write_tokenizer(small, replace(FAMILIES["qwen2"], marks=("<|im_end|>", *(f"<|extra_{n}|>" for n in range(16)))))
    with caplog.at_level("WARNING"):
        MiniGPTv2.from_config(MiniGPTv2Config(llama_model=str(small), **keys), CPU, torch.float32)
    assert "no embeddings for the special tokens <|extra_13|>, <|extra_14|>, <|extra_15|>" in caplog.text
    write_tokenizer(small, FAMILIES["qwen2"], eos_token="<|extra_15|>")
    with pytest.raises(ConfigError, match="ends with id 320, its model has 16 embeddings"):
        MiniGPTv2.from_config(MiniGPTv2Config(llama_model=str(small), **keys), CPU, torch.float32)
