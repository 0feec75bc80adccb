"""``--to pth``: one file in the format of MiniGPT-4's own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from minigpt4.common.config import dump_config
from minigpt4.common.errors import CheckpointError
from minigpt4.export.source import Source
from minigpt4.export.target import Facts, Target

if TYPE_CHECKING:
    from minigpt4.chat.loading import Assistant
    from minigpt4.export.example import Example, Outputs


class Pth(Target):
    """``{"model", "optimizer", "config", "scaler", "epoch"}``, trained tensors only, under the published names.

    ``optimizer`` is empty: its state belongs to groups and a window size that the other code does not have, so such a
    file starts a run (``model.ckpt``), it does not resume one (``run.resume_ckpt_path``).
    """

    name = "pth"

    def refuse(self, source: Source) -> None:
        """Nothing: every architecture has trained tensors."""

    def write(self, source: Source, assistant: Assistant, folder: Path, dtype: torch.dtype) -> None:
        """The names are those of peft 0.2.0: ``...q_proj.lora_A.weight``."""
        content = {
            "model": assistant.model.trainable_state(),
            "optimizer": {},
            "config": yaml.safe_load(dump_config(source.config)),
            "scaler": None,
            "epoch": epoch_of(source),
        }
        torch.save(content, folder / file_name(source))

    def reload(self, source: Source, folder: Path, example: Example) -> Outputs:
        """Through ``model.ckpt`` of a model that is built anew; every tensor must arrive bit for bit."""
        from minigpt4.export.example import outputs_of_model

        path = folder / file_name(source)
        stored = torch.load(path, map_location="cpu", weights_only=True)["model"]
        model = source.load(ckpt=str(path.absolute())).model
        loaded = model.trainable_state()
        wrong = [name for name in loaded if name not in stored or not torch.equal(stored[name], loaded[name])]
        if wrong or len(stored) != len(loaded):
            raise CheckpointError(f"{path.name}: {wrong[0] if wrong else 'a tensor'} does not load back as written")
        return outputs_of_model(model, example)

    def usage(self, source: Source, facts: Facts) -> str:
        """In this repository and in code that reads MiniGPT-4's files."""
        return f"""\
`{file_name(source)}` holds the trained tensors under the names of MiniGPT-4 and the configuration of the run, with
the paths of the machine it ran on. Its optimiser state is empty: start from it, do not resume from it.

In a YAML of this repository, or of code that reads MiniGPT-4's files:

```yaml
model:
  ckpt: {file_name(source)}
```

```python
import torch

tensors = torch.load("{file_name(source)}", weights_only=True)["model"]
```"""


def file_name(source: Source) -> str:
    """As MiniGPT-4 names its files."""
    return f"checkpoint_{epoch_of(source)}.pth"


def epoch_of(source: Source) -> int:
    """The number of the epoch that was finished last, from 0; 0 where the run did not count epochs."""
    per_epoch = source.config.run.iters_per_epoch
    iteration = source.manifest.get("iteration")
    if not per_epoch or not iteration:
        return 0
    return max(0, -(-int(iteration) // per_epoch) - 1)
