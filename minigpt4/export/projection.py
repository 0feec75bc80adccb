"""What lies beside an exported language model: the projection, and vision tensors that no other file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from minigpt4.common.errors import CheckpointError
from minigpt4.common.types import IMAGE_TOKEN
from minigpt4.export.example import Example, Outputs, outputs_of_lm
from minigpt4.export.output import write_tensors
from minigpt4.export.parts import has_qformer
from minigpt4.export.source import Source
from minigpt4.export.target import Facts

PROJECTION_FILE = "projection.safetensors"
VISION_FILE = "vision.safetensors"


def write_beside(folder: Path, projection: nn.Linear, vision: Mapping[str, Tensor]) -> None:
    """The projection, and the vision tensors of a checkpoint if it has any.

    The check of an export starts at vision features, so vision is compared here: it must come back bit for bit.
    """
    write_tensors(
        folder / PROJECTION_FILE, {f"llama_proj.{name}": value for name, value in projection.named_parameters()}
    )
    if not vision:
        return
    write_tensors(folder / VISION_FILE, vision)
    back = load_file(folder / VISION_FILE)
    wrong = [name for name, value in vision.items() if name not in back or not torch.equal(back[name], value)]
    if wrong:
        raise CheckpointError(f"{VISION_FILE}: {wrong[0]} does not come back as written")


@torch.no_grad()
def outputs_with_projection(llm: Any, folder: Path, example: Example) -> Outputs:
    """What a language model answers when the image features go through the projection in ``folder``."""
    weights = {name: value.float() for name, value in load_file(folder / PROJECTION_FILE).items()}
    image = linear(example.features, weights["llama_proj.weight"], weights["llama_proj.bias"])  # [1, P, D]
    ids = torch.tensor([example.ids])
    is_image = ids == IMAGE_TOKEN
    embeddings = llm.get_input_embeddings()(ids.masked_fill(is_image, 0))
    return outputs_of_lm(llm, embeddings.masked_scatter(is_image.unsqueeze(-1), image), example.end)


def projection_usage(source: Source, facts: Facts) -> str:
    """Markdown: how an image enters the prompt."""
    width, count = facts.feature_width, facts.num_image_tokens
    origin = "outputs of the Q-Former" if has_qformer(source.model) else "four merged patches each"
    vision = (
        f"`{VISION_FILE}` holds the trained or random tensors of the vision part, named as in MiniGPT-4's files.\n\n"
        if facts.has_other_tensors
        else "The vision tower is not in this folder: it is the published one, unchanged.\n\n"
    )
    return f"""\
An image is {count} positions of the prompt. Their features ({origin}, {width} wide) go through `{PROJECTION_FILE}`:

```python
from safetensors.torch import load_file

projection = load_file("{PROJECTION_FILE}")
image = torch.nn.functional.linear(
    features, projection["llama_proj.weight"], projection["llama_proj.bias"]
)  # features [1, {count}, {width}] -> [1, {count}, hidden size]
```

{vision}{"The prompt starts with the BOS token. " if facts.has_bos else ""}The texts before and after the image are
tokenised one by one, without special tokens, and `language_model.generate(inputs_embeds=..., attention_mask=...)` gets
the embeddings of text, image, text:

```
{facts.prompt}
```"""
