"""``--to blip2``: MiniGPT-4 with its Q-Former as transformers' own BLIP-2, without code of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.types import IMAGE_TAG, IMAGE_TOKEN
from minigpt4.export.example import Example, Outputs, greedy
from minigpt4.export.hf import plain
from minigpt4.export.merged import generation_config
from minigpt4.export.output import write_json, write_shards
from minigpt4.export.parts import (
    base_config,
    blip2_vision_sizes,
    cast,
    dtype_name,
    has_qformer,
    is_eva,
    merge_lora,
    refuse_unknown_arch,
    whole_state,
)
from minigpt4.export.reading import read_model, read_processor
from minigpt4.export.source import Source
from minigpt4.export.target import Facts, Target
from minigpt4.export.tokenizer_files import check_tokenizer, export_tokenizer
from minigpt4.models.llm import causal_lm

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant

_TO_BLIP2 = (
    ("vision_tower.", "vision_model."),
    ("ln_vision.", "vision_model.post_layernorm."),
    ("projection.", "language_projection."),
)


class Blip2(Target):
    """``Blip2ForConditionalGeneration``. Its layer norm behind the tower has epsilon 1e-6, ours 1e-5."""

    name = "blip2"
    casts = True
    has_vision = True
    hint = " (its layer norm behind the tower has epsilon 1e-6, ours 1e-5; --to hf has none of that)"

    def refuse(self, source: Source) -> None:
        """Needs BLIP-2's parts: an EVA tower and a Q-Former."""
        refuse_unknown_arch(source)
        cfg = source.model
        if not has_qformer(cfg):
            raise ConfigError(
                f"{cfg.arch}{' without a Q-Former' if cfg.arch == 'minigpt4' else ''} merges four patches into one "
                "position, which BLIP-2 cannot; use --to hf"
            )
        if not is_eva(cfg):
            raise ConfigError(f"BLIP-2 has an EVA tower, this model has '{cfg.vit_model}'; use --to hf")

    def write(self, source: Source, assistant: Assistant, folder: Path, dtype: torch.dtype) -> None:
        """Weights, configuration, tokenizer and image processor."""
        model = assistant.model
        llm = merge_lora(model)
        cast(model, dtype)
        state = {blip2_name(name): value for name, value in whole_state(model).items()}
        write_shards(folder, state)
        tokenizer = export_tokenizer(source.model.llama_model, model.encoder.tokenizer)
        image_token_id = free_id(tokenizer, len(causal_lm(llm).get_input_embeddings().weight), source)
        tokenizer.save_pretrained(str(folder))
        generation_config(assistant).save_pretrained(str(folder))
        write_json(folder / "config.json", blip2_config(assistant, dtype, image_token_id))
        write_json(folder / "preprocessor_config.json", image_config(assistant))

    def reload(self, source: Source, folder: Path, example: Example) -> Outputs:
        """By transformers' classes; the prompt has its image tokens in the middle."""
        from minigpt4.conversation.tokenizer import load_tokenizer

        ours = load_tokenizer(source.model.llama_model)
        check_tokenizer(read_processor("AutoTokenizer", folder), ours, "the saved tokenizer")
        image_processor = read_processor("AutoImageProcessor", folder, backend="pil")
        pixels = image_processor(images=example.image.convert("RGB"), return_tensors="pt")["pixel_values"]
        if pixels.shape != example.pixels.shape or not torch.allclose(pixels, example.pixels, rtol=0, atol=1e-6):
            raise CheckpointError("the saved image processor gives other pixels than the model was trained with")
        model = read_model("Blip2ForConditionalGeneration", folder)
        image_id = int(model.config.image_token_index)
        ids = torch.tensor([[image_id if i == IMAGE_TOKEN else i for i in example.ids]])
        inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = model(**inputs).logits[0].float()
        answer = model.generate(**inputs, **greedy(example.end))[0, ids.shape[1] :]
        return Outputs(logits, answer.tolist())

    def usage(self, source: Source, facts: Facts) -> str:
        """How the prompt is put together: Blip2Processor would put the image in front of everything."""
        before, after = facts.prompt.split(IMAGE_TAG)
        stop = f"    stop_strings={list(facts.stop)!r},\n    tokenizer=tokenizer,\n" if facts.stop else ""
        cut = "".join(f".split({text!r})[0]" for text in facts.stop)
        return f"""\
Do not use `Blip2Processor` for the text: it puts the image in front of the prompt, even before BOS. The image belongs
where training had it:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration

folder = "path/to/this/folder"
model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # older: use_fast=False

before = {before!r}
after = {after!r}
image_ids = [model.config.image_token_index] * {facts.num_image_tokens}


def ids(text):
    return tokenizer.encode(text, add_special_tokens=False)


input_ids = torch.tensor([{"[tokenizer.bos_token_id] + " if facts.has_bos else ""}ids(before) + image_ids + ids(after)])
pixel_values = image_processor(images=Image.open("face.png").convert("RGB"), return_tensors="pt")["pixel_values"]
answer = model.generate(
    pixel_values=pixel_values.to(model.dtype),
    input_ids=input_ids,
    attention_mask=torch.ones_like(input_ids),
    max_new_tokens=100,
{stop})[0, input_ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True){cut}.strip())
```

The image token is a row of the vocabulary that ordinary text never uses; do not write it into a question."""


def blip2_name(name: str) -> str:
    """A tensor of the exported class of ours -> the same one of BLIP-2."""
    for ours, theirs in _TO_BLIP2:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def free_id(tokenizer: Any, num_rows: int, source: Source) -> int:
    """A row of the embedding table that no text reaches: BLIP-2 looks the image token up before it is replaced.

    A row behind the vocabulary, else the unknown token (Llama spells unknown characters in bytes). Raises ConfigError.
    """
    if num_rows > len(tokenizer):
        return len(tokenizer)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return int(unknown)
    raise ConfigError(
        f"model.llama_model '{source.model.llama_model}' has no unused row for BLIP-2's image token; use --to hf"
    )


def blip2_config(assistant: Assistant, dtype: torch.dtype, image_token_id: int) -> dict[str, Any]:
    """``config.json``."""
    model = assistant.model
    qformer: Any = model.qformer
    name = dtype_name(dtype)
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "dtype": name,
        "text_config": {**plain(base_config(model.cfg)), "dtype": name},
        "vision_config": blip2_vision_sizes(model),
        "qformer_config": plain(qformer.config),
        "num_query_tokens": model.encoder.num_image_tokens,
        "image_token_index": image_token_id,
        "tie_word_embeddings": False,
    }


def image_config(assistant: Assistant) -> dict[str, Any]:
    """``preprocessor_config.json``: a square by bicubic interpolation, the normalisation of training."""
    spec = assistant.image_processor.spec
    return {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": spec.size, "width": spec.size},
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
