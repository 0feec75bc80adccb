"""``--to hf``: the whole model as a folder that transformers loads with ``trust_remote_code``."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt4.common.errors import CheckpointError, ConfigError
from minigpt4.common.types import IMAGE_TOKEN
from minigpt4.export.example import Example, Outputs, greedy
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
from minigpt4.export.prompt import bos_id, endings, prompt_format
from minigpt4.export.reading import read_model, read_processor
from minigpt4.export.source import Source
from minigpt4.export.target import Facts, Target
from minigpt4.export.tokenizer_files import add_image_token, export_tokenizer

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant

REMOTE = Path(__file__).parent / "remote"
MODELING, PROCESSING = "modeling_minigpt", "processing_minigpt"
QUESTION_TEXTS = ("identity", "blip_caption")
"""Cleanings of questions that the exported processor knows."""


class HuggingFace(Target):
    """``AutoModelForImageTextToText`` and ``AutoProcessor``, with the code they need beside the weights."""

    name = "hf"
    casts = True
    has_vision = True

    def refuse(self, source: Source) -> None:
        """Needs an architecture and a cleaning of questions that the exported code knows."""
        refuse_unknown_arch(source)
        if source.question_processor not in QUESTION_TEXTS:
            raise ConfigError(
                f"questions go through '{source.question_processor}', which the exported code does not know; "
                f"--question-processor may be: {', '.join(QUESTION_TEXTS)}"
            )

    def write(self, source: Source, assistant: Assistant, folder: Path, dtype: torch.dtype) -> None:
        """Weights in shards, the configuration, the tokenizer, the processor and the two files of code."""
        model = assistant.model
        merge_lora(model)
        cast(model, dtype)
        write_shards(folder, whole_state(model))
        tokenizer = export_tokenizer(source.model.llama_model, model.encoder.tokenizer)
        image_token_id = add_image_token(tokenizer)
        tokenizer.save_pretrained(str(folder))
        generation_config(assistant).save_pretrained(str(folder))
        write_json(folder / "config.json", model_config(assistant, dtype, image_token_id))
        write_json(folder / "processor_config.json", processor_config(source, assistant, image_token_id))
        for name in (MODELING, PROCESSING):
            shutil.copyfile(REMOTE / f"{name}.py", folder / f"{name}.py")

    def reload(self, source: Source, folder: Path, example: Example) -> Outputs:
        """As a reader would: Auto classes, then a message with the picture and the question."""
        try:
            processor = read_processor("AutoProcessor", folder, trust_remote_code=True)
            model = read_model("AutoModelForImageTextToText", folder, trust_remote_code=True)
        finally:
            forget_remote_code(folder)
        content = [{"type": "image", "image": example.image}, {"type": "text", "text": example.question}]
        inputs: dict[str, Tensor] = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        check_inputs(inputs, example, model.config.image_token_id)
        with torch.no_grad():
            logits = model(**inputs).logits[0].float()
        return Outputs(logits, model.generate(**inputs, **greedy(example.end))[0].tolist())

    def usage(self, source: Source, facts: Facts) -> str:
        """A message with a picture, a batch, and text that is rendered already."""
        extra = "" if is_eva(source.model) else " Its vision tower is timm's: `pip install timm`."
        return f"""\
The folder brings its own code (`{MODELING}.py`, `{PROCESSING}.py`). Read it, then allow it with
`trust_remote_code`.{extra}

```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/to/this/folder"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto")

messages = [
    {{"role": "user", "content": [
        {{"type": "image", "image": Image.open("face.png")}},
        {{"type": "text", "text": "What does the face express?"}},
    ]}}
]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
ids = model.generate(
    **inputs, max_new_tokens=100, stop_strings=processor.stop or None, tokenizer=processor.tokenizer
)  # new ids only
print(processor.post_process_image_text_to_text(ids)[0])
```

A conversation goes on with `{{"role": "assistant", "content": answer}}` and the next question. A list of conversations
is a batch. `processor(images=..., text=...)` takes text that is rendered already, with `<ImageHere>` where an image
stands ({facts.num_image_tokens} positions each). What the model was sent for the example of the check:

```
{facts.prompt}
```"""


def model_config(assistant: Assistant, dtype: torch.dtype, image_token_id: int) -> dict[str, Any]:
    """``config.json``."""
    model = assistant.model
    cfg = model.cfg
    tower: dict[str, Any] = {"vision_config": None, "timm_config": None, "qformer_config": None}
    if is_eva(cfg):
        tower["vision_config"] = blip2_vision_sizes(model)
    else:
        tower["timm_config"] = {"name": cfg.vit_model, "img_size": cfg.image_size, **cfg.vit_config}
        tower["tower_normalises"] = model.vision.is_normed
    if has_qformer(cfg):
        qformer: Any = model.qformer
        tower["qformer_config"] = plain(qformer.config)
    name = dtype_name(dtype)
    return {
        "architectures": ["MiniGptForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{MODELING}.MiniGptConfig",
            "AutoModelForImageTextToText": f"{MODELING}.MiniGptForConditionalGeneration",
        },
        "model_type": "minigpt_vlm",
        "dtype": name,
        "text_config": {**plain(base_config(cfg)), "dtype": name},
        **tower,
        "merged_tokens": cfg.vision_tokens_per_position,
        "num_image_tokens": model.encoder.num_image_tokens,
        "image_token_id": image_token_id,
    }


def processor_config(source: Source, assistant: Assistant, image_token_id: int) -> dict[str, Any]:
    """``processor_config.json``: the prompt format of the chat and the pixels of training."""
    model = assistant.model
    encoder, tokenizer = model.encoder, model.encoder.tokenizer
    stop, end_ids = endings(assistant)
    return {
        "processor_class": "MiniGptProcessor",
        "auto_map": {"AutoProcessor": f"{PROCESSING}.MiniGptProcessor"},
        "image_size": model.cfg.image_size,
        "image_mean": list(assistant.image_processor.spec.mean),
        "image_std": list(assistant.image_processor.spec.std),
        "num_image_tokens": encoder.num_image_tokens,
        "image_token_id": image_token_id,
        "bos_token_id": bos_id(assistant),
        "end_token_ids": end_ids,
        "pad_token_id": tokenizer.pad_id,
        "prompt_format": prompt_format(assistant),
        "question_text": source.question_processor,
        "stop": stop,
    }


def check_inputs(inputs: dict[str, Tensor], example: Example, image_token_id: int) -> None:
    """Raises CheckpointError when the exported processor makes other ids or pixels than the model was trained with."""
    ids = [IMAGE_TOKEN if i == image_token_id else i for i in inputs["input_ids"][0].tolist()]
    if ids != example.ids:
        raise CheckpointError(f"the exported processor gives the ids {ids}, the model's prompt is {example.ids}")
    if not torch.equal(inputs["pixel_values"], example.pixels):
        raise CheckpointError("the exported processor gives other pixels than the model was trained with")


def forget_remote_code(folder: Path) -> None:
    """Remove the copy of the folder's code that transformers keeps in the user's cache, under the draft's name."""
    cache = Path(importlib.import_module("transformers.utils").HF_MODULES_CACHE) / "transformers_modules"
    name = folder.name.replace(".", "_dot_").replace("-", "_hyphen_")  # as transformers makes it a module
    name = f"_{name}" if name[0].isdigit() else name
    shutil.rmtree(cache / name, ignore_errors=True)
    for module in [module for module in sys.modules if f".{name}." in module]:
        del sys.modules[module]


def plain(config: Any) -> dict[str, Any]:
    """A configuration of transformers as JSON values, without the folder it came from."""
    content: dict[str, Any] = json.loads(config.to_json_string())
    content.pop("_name_or_path", None)
    content.pop("transformers_version", None)
    return content
