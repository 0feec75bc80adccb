"""Every shipped recipe of the published stages passes ``--dry-run`` on made-up data of the right shape."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from minigpt4 import catalog
from minigpt4.cli import train_command
from minigpt4.datasets.cards import find_card
from tests.config_fakes import REPOSITORY
from tests.data_parts import tar_file
from tests.golden_cases import LLAMA, TINY_EVA
from tests.published_parts import dump, picture

FACES = "MiniFaceGPT4Data"
QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY = {"vit_model": "eva", "vit_config": TINY_EVA, "vit_weights": "random", "llama_model": str(LLAMA)}
EXPECTED = {
    "minigpt4_stage1_pretrain": ("laion", "cc_sbu"),
    "minigpt4_llama2_stage1_pretrain": ("laion", "cc_sbu"),
    "minigpt4_stage2_finetune": ("cc_sbu_align",),
    "minigpt4_llama2_stage2_finetune": ("cc_sbu_align",),
    "minigpt4_stage2_finetune_gpt4vision": ("sharegpt_detail", "gpt4visionface_detail"),
    "minigptv2_finetune_gpt4vision": ("RealisticEmotions_detail",),
    "minigptv2_finetune_gpt4vision_Full": ("sharegpt_detail", "gpt4visionface_detail", "RealisticEmotions_detail"),
}


def shard(path: Path, pairs: int) -> None:
    """What img2dataset writes: a picture, its caption and a record per key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = BytesIO()
    Image.new("RGB", (40, 30), (200, 60, 40)).save(image, "JPEG")
    members: dict[str, bytes] = {}
    for number in range(pairs):
        key = f"{number:09d}"
        members[f"{key}.jpg"] = image.getvalue()
        members[f"{key}.txt"] = b"a red wall"
        members[f"{key}.json"] = json.dumps({"caption": "a red wall", "key": key}).encode()
    tar_file(path, members)


def made_up_data(root: Path) -> Path:
    """All files that the stages name, below ``root``."""
    for name in ("laion/laion_dataset", "cc_sbu/cc_sbu_dataset"):
        shard(root / name / "00000.tar", 3)
    align = root / "cc_sbu_align"
    dump(align / "filter_cap.json", {"annotations": [{"image_id": "7", "caption": "The wall is red."}]})
    picture(align / "image" / "7.jpg")
    share, vision, emotions = (root / FACES / f"{name}Data" for name in ("ShareGPT", "GPT4Vision", "RealisticEmotions"))
    said = [{"from": "human", "value": "<image>\nWho is it?"}, {"from": "gpt", "value": "A woman who smiles."}]
    dump(
        share / "Annotations" / "subset_objects_gpt4vision_100k.json",
        [{"id": "1", "image": "a/1.jpg", "conversations": said}],
    )
    picture(share / "Images" / "a" / "1.jpg")
    card = find_card("gpt4visionface_detail")
    assert card is not None
    sections = yaml.safe_load(card.read_text(encoding="utf-8"))["datasets"]["gpt4visionface_detail"]["build_info"]
    dump(
        vision / "Annotations" / "gpt4VisionCalls_Cleaned_BySection.json",
        {name: [{"id": "2", "image": "2.jpg", "conversations": said}] for name in sections["subsets_prompts"]},
    )
    picture(vision / "Images" / "2.jpg")
    dump(
        emotions / "Annotations" / "Modified_PromptsSmall_AffectOnly_41ksamples.json",
        {"3.jpg": "A realistic photo of a person with a happy expression."},
    )
    picture(emotions / "Images" / "3.jpg")
    return root


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_passes_its_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog.load()
    monkeypatch.setenv("MINIGPT4_DATA", str(made_up_data(tmp_path / "data")))
    content = yaml.safe_load((REPOSITORY / "train_configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    content["model"].pop("ckpt", None)
    content["model"] |= {**TINY, "image_size": 56}
    if "q_former_model" in content["model"]:
        changes: dict[str, Any] = {"q_former_model": "random", "qformer_config": QFORMER}
        content["model"] |= changes
    for block in content["datasets"].values():
        if ".tar" in str(block["build_info"].get("storage", "")):
            block["build_info"]["storage"] = block["build_info"]["storage"].partition("{0")[0] + "00000.tar"
    content["run"] |= {"device": "cpu", "output_dir": str(tmp_path / "output")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert train_command(["--cfg-path", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for dataset in EXPECTED[name]:
        assert f"data    {dataset} " in shown and f"example {dataset}:" in shown
    assert ">>" in shown and not (tmp_path / "output").exists()
