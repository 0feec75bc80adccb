"""Both architectures reproduce the reference's numbers: vision, ids, labels, logits, loss, gradients, greedy ids."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt4.common.types import Turn
from minigpt4.conversation.templates import TEMPLATES
from minigpt4.models.generation import GenerateOptions
from minigpt4.models.vision import resize_position_table
from minigpt4.models.weights import canonical_name
from tests.golden_cases import CASES, GOLDEN, build_model, encode, images_of, load_case, packed, padded


@pytest.mark.parametrize("name", [name for name in CASES if load_case(name).has("image")])
def test_vision_output_and_projected_embeddings_are_the_reference_s(name: str) -> None:
    case = load_case(name)
    model = build_model(case)
    with torch.no_grad():
        tokens = model.visual_encoder(case.tensor("image"))
        torch.testing.assert_close(tokens, case.tensor("vit_out"), atol=1e-5, rtol=0)
        torch.testing.assert_close(model.ln_vision(tokens), case.tensor("ln_vision_out"), atol=1e-5, rtol=0)
        if case.has("qformer_last_hidden_state"):
            features = model.vision_features(case.tensor("image"))
            torch.testing.assert_close(features, case.tensor("qformer_last_hidden_state"), atol=1e-5, rtol=0)
        embeddings = model.encode_images(case.tensor("image"))
    torch.testing.assert_close(embeddings, case.tensor("img_embeds"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels_are_the_reference_s(name: str) -> None:
    case = load_case(name)
    samples = encode(build_model(case), case)
    targets, mask = case.tensor("targets"), case.tensor("attention_mask")
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        assert sample.labels == targets[row, :length].tolist()
        assert (targets[row, length:] == -100).all()
        assert int(mask[row].sum()) == length
    assert sum(label != -100 for s in samples for label in s.labels) == case.meta["supervised_tokens"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", [padded, packed])
def test_logits_loss_and_gradients_are_the_reference_s(name: str, layout: object) -> None:
    case = load_case(name)
    model = build_model(case)
    batch = layout(encode(model, case), images_of(case))  # type: ignore[operator]
    with torch.no_grad():
        embeddings = model.embed(batch.input_ids, batch.images, batch.num_image_positions)
        hidden = model.hidden_states(embeddings, batch.position_ids, batch.lengths)
        logits = model._lm.get_output_embeddings()(hidden.flatten(0, 1)[batch.supervised])
    torch.testing.assert_close(logits, case.tensor("supervised_logits"), atol=5e-5, rtol=0)
    output = model(batch)
    assert output.loss_sum.item() / batch.num_target_tokens == pytest.approx(case.meta["loss_mean"], abs=1e-5)
    (output.loss_sum / batch.num_target_tokens).backward()
    expected = {canonical_name(key): value for key, value in case.tensors("grads").items()}
    for key, parameter in model.trainable_parameters_by_name():
        if key not in expected:  # text only: the projection is touched with weight zero
            assert parameter.grad is not None and not parameter.grad.any(), key
            continue
        assert parameter.grad is not None
        relative = (parameter.grad - expected[key]).norm() / expected[key].norm()
        assert relative < 1e-4, key


@pytest.mark.parametrize("name", CASES)
def test_sample_losses_give_the_reference_s_candidate_scores(name: str) -> None:
    case = load_case(name)
    model = build_model(case)
    batch = padded(encode(model, case), images_of(case))
    with torch.no_grad():
        scores = model(batch).sample_loss / (case.tensor("targets").shape[1] - 1)
    torch.testing.assert_close(scores, case.tensor("loss_none"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "generate" in load_case(name).meta])
def test_greedy_generation_gives_the_reference_s_ids_and_answers(name: str) -> None:
    case = load_case(name)
    model, expected = build_model(case), case.meta["generate"]
    prompts = [model.encoder.encode_text(text) for text in expected["texts"]]
    options = GenerateOptions(max_new_tokens=expected["max_new_tokens"])
    with torch.no_grad():
        embeddings, mask = model._left_padded(prompts, case.tensor("gen_images"))
        ids = model._run(embeddings, mask, options, None)
    assert ids.tolist() == expected["token_ids"]
    batched = model.generate(prompts, case.tensor("gen_images"), options)
    assert batched == expected["answers"]
    singly = [model.generate([p], case.tensor("gen_images")[i : i + 1], options)[0] for i, p in enumerate(prompts)]
    assert singly == batched
    streamed = "".join(model.generate_stream(prompts[0], case.tensor("gen_images")[:1], options))
    assert streamed == batched[0]


@pytest.mark.parametrize(
    ("chat", "template", "case_name"),
    [
        ("Vicuna0", "vicuna_v0", "a_minigpt4_qformer_vicuna"),
        ("LLama2", "llama2", "b_minigpt4_noqformer_llama2"),
        ("minigptv2", "minigpt_v2", "c_minigptv2_lora_instruction"),
    ],
)
def test_published_chat_prompts_render_and_answer_as_in_the_reference(chat: str, template: str, case_name: str) -> None:
    golden = json.loads((GOLDEN / "chat" / "chat.json").read_text())[chat]
    tensors = load_file(GOLDEN / "chat" / f"{chat}.safetensors")
    model = build_model(load_case(case_name))
    image = tensors["image"] if tensors["image"].dim() == 4 else tensors["image"][None]
    first = "<Img><ImageHere></Img> What is the emotion shown by the person in the photo?"
    history = [Turn(first, "The person seems to be sad.")]
    texts = [
        TEMPLATES[template].render([], first),
        TEMPLATES[template].render(history, "Why do you think so?"),
    ]
    assert texts == [golden["prompt_turn1"], golden["prompt_turn2"]]
    for text, key in zip(texts, ("greedy_turn1", "greedy_turn2"), strict=True):
        prompt = model.encoder.encode_text(text)
        with torch.no_grad():
            embeddings, mask = model._left_padded([prompt], image)
            options = GenerateOptions(max_new_tokens=12, repetition_penalty=1.05)
            ids = model._run(embeddings, mask, options, None)[0].tolist()
        assert ids == golden[f"{key}_ids_with_leading_bos"][1:]


@pytest.mark.parametrize("side", [3, 8, 10])
def test_position_table_is_resized_without_antialias(side: int) -> None:
    state = load_file(GOLDEN / "pos_embed" / "eva_4x4_state.safetensors")
    name = next(key for key in state if key.endswith("pos_embed"))
    resized = resize_position_table(state[name], side * side + 1)
    expected = torch.from_numpy(np.load(GOLDEN / "pos_embed" / f"pos_embed_{side}x{side}.npy"))
    torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)


def test_position_table_of_a_half_precision_file_is_resized_in_float32() -> None:
    state = load_file(GOLDEN / "pos_embed" / "eva_4x4_state.safetensors")
    name = next(key for key in state if key.endswith("pos_embed"))
    resized = resize_position_table(state[name].half(), 65)
    expected = torch.from_numpy(np.load(GOLDEN / "pos_embed" / "pos_embed_8x8_from_fp16.npy"))
    torch.testing.assert_close(resized, expected.float(), atol=1e-6, rtol=0)
