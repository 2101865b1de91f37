"""Every published recipe of a vision-language model trains from parts with the files that the hub has.

The parts lie in folders of their names on the hub, and the data in those of the recipes, so that a recipe runs as it
is: on a CPU, with small batches, for two steps.
"""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch

from mmlab import cli
from mmlab.config.compose import compose, conf_dir
from tests.tiny_hub import PARTS
from tests.tiny_shapes import make_shapes

RECIPES = sorted(
    f"{path.parent.name}/{path.stem}"
    for family in ("llava", "minigpt4", "prismatic")
    for path in (conf_dir() / "experiment" / family).glob("*.yaml")
    if not path.stem.endswith("_tiny")
)
SMALL = "data.workers=0 data.global_batch=2 data.micro_batch=2 trainer.accelerator=cpu trainer.devices=1"
SMALL += " trainer.strategy=auto trainer.max_epochs=null trainer.max_steps=2 callbacks.samples=null"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with all parts and data of the recipes."""
    root = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    for name, write in PARTS.items():
        (root / name).mkdir(parents=True)
        write(root / name)
    make_shapes(root / "shapes", train=4)
    for name in (
        "lcs_558k",
        "cc3m_595k",
        "llava_instruct_158k",
        "llava_mix_665k",
        "llava_next_779k",
        "scienceqa",
        "cc_sbu_align",
    ):
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / name).symlink_to(root / "shapes")
    (root / "data" / "laion_cc_sbu").mkdir()
    for name in ("laion", "cc_sbu"):
        copytree(root / "shapes" / "train", root / "data" / "laion_cc_sbu" / name)
    return root


def train(recipe: str) -> Path:
    """Train a recipe, after those that it starts from; returns its folder."""
    folder = Path("runs") / recipe.replace("/", "-")
    if not folder.exists():
        for earlier in compose("train", [f"experiment={recipe}"]).stage.init_from:
            train(earlier)
        assert cli.main(["train", f"experiment={recipe}", f"run.name={folder.name}", *SMALL.split()]) == 0
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_from_its_parts(workplace, monkeypatch, recipe):
    monkeypatch.chdir(workplace)
    folder = train(recipe)
    cfg = compose("train", [f"experiment={recipe}"])
    done = json.loads((folder / "done.json").read_text())
    assert done["steps"] == 2 and 0 < done["train/loss"] < 200
    adapted = cfg.stage.get("lora") or {}
    assert {path.name for path in (folder / "artifacts").iterdir()} == set(cfg.stage.trainable)
    for name in cfg.stage.trainable:
        file = "adapter_model.safetensors" if name in adapted else "model.safetensors"
        assert (folder / "artifacts" / name / file).stat().st_size > 0, name
        assert (folder / "artifacts" / name / "card.json").is_file()
    assert json.loads((folder / "data_report.json").read_text())["train"]["seen"] == 4
