"""``--to peft``: LoRA as a peft adapter, and the projection beside it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minigpt4.common.errors import ConfigError
from minigpt4.export.output import write_json
from minigpt4.export.parts import other_tensors, refuse_other_projection
from minigpt4.export.projection import outputs_with_projection, projection_usage, write_beside
from minigpt4.export.reading import library
from minigpt4.export.source import Source
from minigpt4.export.target import Facts, Target, base_name

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.export.example import Example, Outputs


class Adapter(Target):
    """``adapter_config.json`` and ``adapter_model.safetensors`` for the unchanged language model."""

    name = "peft"

    def refuse(self, source: Source) -> None:
        """Needs LoRA on a language model that has files of its own."""
        if source.model.lora_r == 0:
            raise ConfigError(
                "this model has no LoRA (lora_r: 0), so there is no adapter; use --to hf for all of it, merged for its "
                "language model and projection, or pth for its trained tensors"
            )
        if source.model.llama_weights == "random":
            raise ConfigError("the language model is random, no adapter fits another one; use --to merged or hf")

    def write(self, source: Source, assistant: Assistant, folder: Path, dtype: torch.dtype) -> None:
        """The adapter names its base by a hub id or the name of its folder, never by a path of this machine."""
        model = assistant.model
        projection = refuse_other_projection(model)
        lora: Any = model.llama_model
        with warnings.catch_warnings():  # peft looks for the base on the hub to see whether its vocabulary changed
            warnings.simplefilter("ignore", UserWarning)
            lora.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty template; ours follows
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = base_name(source)
        write_json(folder / "adapter_config.json", settings)
        write_beside(folder, projection, other_tensors(model))

    def reload(self, source: Source, folder: Path, example: Example) -> Outputs:
        """The language model from its own folder, the adapter by peft, the projection from its file."""
        from peft import PeftModel

        base = library().AutoModelForCausalLM.from_pretrained(source.model.llama_model, dtype=torch.float32)
        with warnings.catch_warnings():  # peft asks transformers for a name that it is about to drop
            warnings.simplefilter("ignore", FutureWarning)
            llm = PeftModel.from_pretrained(base, str(folder)).eval()
        return outputs_with_projection(llm, folder, example)

    def usage(self, source: Source, facts: Facts) -> str:
        """Base, adapter, projection, and how a prompt is put together."""
        return f"""\
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_name(source)}", dtype="auto")
language_model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()
```

{projection_usage(source, facts)}"""
