"""What must hold for every architecture: no leak between samples, frozen parts at rest, weights that load or fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minigpt4.common.checkpoint import save_checkpoint
from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.types import Batch, Encoded
from minigpt4.models.answer_text import clean_answer
from minigpt4.models.base_model import BaseModel
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.losses import LogitShape, token_losses
from minigpt4.models.weights import read_state
from tests.golden_cases import build_model, encode, images_of, load_case, packed, padded

V2, VICUNA = "c_minigptv2_lora_instruction", "a_minigpt4_qformer_vicuna"


def grads(model: BaseModel, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = model(batch).loss_sum
        loss.backward()
        total += float(loss)
    return total, {name: p.grad.clone() for name, p in model.trainable_parameters_by_name() if p.grad is not None}


@pytest.mark.parametrize("name", [V2, VICUNA, "d_minigptv2_conversation"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize("by_sample", [True, False])
def test_samples_in_one_batch_equal_separate_runs(
    name: str, mode: str, recompute: bool, by_sample: bool, layout: Callable[[list[Encoded], Tensor], Batch]
) -> None:
    case = load_case(name)
    changes = {"use_grad_checkpoint_llm": recompute, "lora_dropout": 0.0}
    model = build_model(case, **changes).train(mode == "train")
    assert model.attends_by_sample
    if not by_sample:  # what a model gets that cannot be told the lengths: transformers' block-diagonal masks
        model.attends_by_sample = False
        model._lm.set_attn_implementation("sdpa")
    samples, images = encode(model, case), images_of(case)
    alone = [padded([sample], images[i : i + 1]) for i, sample in enumerate(samples)]
    loss_together, grads_together = grads(model, [layout(samples, images)])
    loss_alone, grads_alone = grads(model, alone)
    assert loss_together == pytest.approx(loss_alone, abs=1e-4)
    for key, grad in grads_alone.items():
        torch.testing.assert_close(grads_together[key], grad, atol=2e-4, rtol=1e-4)


def test_a_leak_would_be_caught() -> None:
    case = load_case(V2)
    model = build_model(case)
    samples, images = encode(model, case), images_of(case)
    batch = packed(samples, images)
    with torch.no_grad():
        right = float(model(batch).loss_sum)
        embeddings = model.embed(batch.input_ids, batch.images, batch.num_image_positions)
        leaked = model.hidden_states(embeddings, batch.position_ids, (batch.input_ids.shape[1],))
        clean = model.hidden_states(embeddings, batch.position_ids, batch.lengths)
    assert (leaked - clean).abs().max() > 0.1
    assert right == pytest.approx(case.meta["loss_mean"] * batch.num_target_tokens, abs=1e-3)


def test_frozen_parts_stay_in_eval_mode_and_lora_trains() -> None:
    model = build_model(load_case(V2)).train()
    assert not model.visual_encoder.training and not model.ln_vision.training
    assert model.llama_model.training and model.llama_proj.training
    names = [name for name, _ in model.trainable_parameters_by_name()]
    assert len([n for n in names if ".lora_" in n]) == 12
    assert names[-2:] == ["llama_proj.weight", "llama_proj.bias"]


def test_text_only_batches_touch_the_projection_with_zero() -> None:
    case = load_case("e_minigptv2_textonly")
    model = build_model(case)
    _, found = grads(model, [padded(encode(model, case), images_of(case))])
    assert not found["llama_proj.weight"].any()


def test_a_wrong_number_of_images_names_both_counts() -> None:
    case = load_case(V2)
    model = build_model(case)
    with pytest.raises(ValueError, match="48 image positions in the ids but 2 images give 32"):
        model(padded(encode(model, case), images_of(case)[:2]))


@pytest.mark.parametrize("name", [V2, VICUNA])
def test_trainable_state_round_trips_under_published_names(name: str) -> None:
    case = load_case(name)
    model = build_model(case)
    state = model.trainable_state()
    assert any(key in state for key in ("llama_proj.weight",))
    assert not any(".default." in key or "base_layer" in key for key in state)
    other = build_model(case)
    with torch.no_grad():
        for _, parameter in other.trainable_parameters_by_name():
            parameter.zero_()
    other.load_weights(state, "checkpoint", complete=True)
    batch = padded(encode(model, case), images_of(case))
    assert float(other(batch).loss_sum) == float(model(batch).loss_sum)


@pytest.mark.parametrize("style", [".lora_A.weight", ".lora_A.default.weight"])
def test_both_spellings_of_lora_names_load(style: str) -> None:
    case = load_case(V2)
    model = build_model(case)
    infix = style.removeprefix(".lora_A").removesuffix(".weight")
    state = {
        key.replace(".lora_A.weight", f".lora_A{infix}.weight").replace(
            ".lora_B.weight", f".lora_B{infix}.weight"
        ): value
        for key, value in model.trainable_state().items()
    }
    report = model.load_weights(state, "file", complete=True)
    assert report.loaded["LoRA"] == 12 and not report.missing


def test_lora_weights_that_do_not_apply_are_an_error() -> None:
    model = build_model(load_case(V2))
    state = {key.replace("q_proj", "w_pack"): value for key, value in model.trainable_state().items()}
    with pytest.raises(CheckpointError, match="6 LoRA matrices in the file do not apply"):
        model.load_weights(state, "foreign.pth")


def test_a_rank_that_differs_is_an_error() -> None:
    case = load_case(V2)
    state = build_model(case).trainable_state()
    state = {key: value[:2] if ".lora_A" in key else value for key, value in state.items()}
    with pytest.raises(CheckpointError, match="check lora_r"):
        build_model(case).load_weights(state, "other.pth")


def test_a_part_may_be_absent_as_a_whole_but_not_in_pieces() -> None:
    case = load_case(V2)
    model = build_model(case)
    state = model.trainable_state()
    stage1 = {key: value for key, value in state.items() if key.startswith("llama_proj")}
    assert "no tensors of LoRA" in "\n".join(model.load_weights(stage1, "stage1").lines())
    with pytest.raises(CheckpointError, match="12 trained tensors are missing"):
        model.load_weights(stage1, "stage1", complete=True)
    del state["llama_proj.bias"]
    with pytest.raises(CheckpointError, match=r"first: llama_proj\.bias"):
        model.load_weights(state, "broken")


def test_buffers_of_published_files_are_expected_and_other_names_are_not() -> None:
    model = build_model(load_case(V2))
    state = model.trainable_state()
    buffer = "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    assert model.load_weights({**state, buffer: torch.zeros(8)}, "file").ignored
    with pytest.raises(CheckpointError, match="unknown to this model, first: mystery"):
        model.load_weights({**state, "mystery": torch.zeros(8)}, "file")


def test_an_image_size_that_does_not_fit_the_patch_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest: 112 or 126"):
        build_model(load_case(V2), image_size=120)


def test_a_lora_target_in_no_layer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'w_pack' is in no layer"):
        build_model(load_case(V2), lora_target_modules=["w_pack"])


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(scale=0.25), LogitShape(cap=1.5), LogitShape(2.0, 1.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_loss_equals_the_ordinary_one(chunk: int, shape: LogitShape, bias: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias)
    hidden, targets = torch.randn(23, 16), torch.randint(0, 50, (23,))
    weights = torch.rand(23)
    results = []
    for trains in (False, True):  # a frozen head takes the chunked path
        head.requires_grad_(trains)
        h = hidden.clone().requires_grad_()
        losses = token_losses(h, head, targets, chunk, shape)
        (losses * weights).sum().backward()
        results.append((losses.detach(), h.grad))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=0)


def test_the_logits_of_a_huge_vocabulary_stay_in_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, linear = [], torch.nn.functional.linear

    def counted(*given: torch.Tensor) -> torch.Tensor:
        logits = linear(*given)
        sizes.append(logits.numel() * 4)
        return logits

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    head = torch.nn.Linear(2, 300_000, bias=False).requires_grad_(False)
    token_losses(torch.ones(40, 2), head, torch.zeros(40, dtype=torch.long))
    assert len(sizes) == 2 and max(sizes) <= 1 << 25


def test_a_stop_text_ends_each_row_on_its_own_and_is_not_shown() -> None:
    case = load_case(VICUNA)
    model = build_model(case)
    prompts = [model.encoder.encode_text(text) for text in case.meta["generate"]["texts"]]
    images = case.tensor("gen_images")
    stop = case.meta["generate"]["answers"][0][4:12]
    options = GenerateOptions(max_new_tokens=12, stop=(stop,))
    answers = model.generate(prompts, images, options)
    assert answers[0] == case.meta["generate"]["answers"][0][:4].strip()
    assert answers[1] == case.meta["generate"]["answers"][1]
    assert "".join(model.generate_stream(prompts[0], images[:1], options)) == answers[0]


def test_sampling_with_a_seed_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    case = load_case(V2)
    model = build_model(case)
    prompts = [model.encoder.encode_text(text) for text in case.meta["generate"]["texts"]]
    options = GenerateOptions(max_new_tokens=8, do_sample=True, temperature=1.5, top_p=1.0, seed=3)
    before = torch.random.get_rng_state()
    first, second = (model.generate(prompts, case.tensor("gen_images"), options) for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.random.get_rng_state())


def test_answers_are_cleaned_as_in_the_reference() -> None:
    assert clean_answer(" A man.###Human: x", ("###",)) == "A man."
    assert clean_answer("[INST] q [/INST] yes ") == "yes"


def test_initial_weights_may_be_named_by_their_job_folder(tmp_path: Path) -> None:
    case = load_case(V2)
    model = build_model(case)
    job = tmp_path / "jobs" / "20260101_000000"
    save_checkpoint(
        job / "checkpoints",
        1,
        weights=model.trainable_state(),
        config_text="model: {}\n",
        manifest={},
        resume=None,
        keep_last=1,
    )
    for folder in (job.parent, job, job / "checkpoints" / "last"):
        assert read_state(folder).keys() == model.trainable_state().keys()
    with pytest.raises(CheckpointError, match="incomplete"):
        read_state(tmp_path)
