"""``--to merged``: LoRA added to the language model, saved as an ordinary Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minigpt4.export.parts import base_config, cast, merge_lora, other_tensors, refuse_other_projection
from minigpt4.export.projection import outputs_with_projection, projection_usage, write_beside
from minigpt4.export.prompt import endings
from minigpt4.export.reading import library, read_model, read_processor
from minigpt4.export.source import Source
from minigpt4.export.target import Facts, Target
from minigpt4.export.tokenizer_files import check_tokenizer, export_tokenizer

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.export.example import Example, Outputs


class Merged(Target):
    """The language model alone, for programs that know nothing of images, and the projection beside it."""

    name = "merged"
    casts = True

    def refuse(self, source: Source) -> None:
        """Nothing: without LoRA the folder is the language model as it was."""

    def write(self, source: Source, assistant: Assistant, folder: Path, dtype: torch.dtype) -> None:
        """``tokenizer.model`` is copied too: with it the folder is a ``llama_model`` of this repository."""
        model = assistant.model
        projection = refuse_other_projection(model)
        vision = other_tensors(model)
        llm = merge_lora(model)
        cast(llm, dtype)
        cast(projection, dtype)
        llm.generation_config = generation_config(assistant)
        llm.save_pretrained(str(folder), max_shard_size="5GB")
        config = base_config(source.model)  # ours has training's settings in it
        config.dtype = dtype
        config.architectures = [type(llm).__name__]
        config.save_pretrained(str(folder))
        export_tokenizer(source.model.llama_model, model.encoder.tokenizer).save_pretrained(str(folder))
        sentencepiece = Path(source.model.llama_model) / "tokenizer.model"
        if sentencepiece.is_file():
            shutil.copyfile(sentencepiece, folder / sentencepiece.name)
        write_beside(folder, projection, vision)

    def reload(self, source: Source, folder: Path, example: Example) -> Outputs:
        """By AutoModelForCausalLM and AutoTokenizer; no tensor may be missing or left over."""
        from minigpt4.conversation.tokenizer import load_tokenizer

        ours = load_tokenizer(source.model.llama_model)
        check_tokenizer(read_processor("AutoTokenizer", folder), ours, "the saved tokenizer")
        llm = read_model("AutoModelForCausalLM", folder)
        return outputs_with_projection(llm, folder, example)

    def usage(self, source: Source, facts: Facts) -> str:
        """The folder as any language model, and how an image enters the prompt."""
        return f"""\
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

language_model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{projection_usage(source, facts)}"""


def generation_config(assistant: Assistant) -> Any:
    """Greedy answers of at most 300 tokens, as the chat gives them; without advice of the language model's folder."""
    tokenizer, (_, end_ids) = assistant.model.encoder.tokenizer, endings(assistant)
    return library().GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=end_ids if len(end_ids) > 1 else end_ids[0],
        pad_token_id=tokenizer.pad_id,
        do_sample=False,
        max_new_tokens=300,
    )
