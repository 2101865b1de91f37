"""Every recipe is composed and run: two steps with small parts and drawn pictures, through the real command."""

import json
import re

import pytest

from mmlab import cli
from mmlab.config.build import check_targets
from mmlab.config.compose import compose
from mmlab.config.locate import conf_dir
from tests.tiny_shapes import make_shapes

CONF = conf_dir() / "experiment"
RECIPES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
PUBLISHED = [name for name in RECIPES if re.fullmatch(r"llava/v\d+_.*", name)]
# What each stage leaves behind.
LEARNS = {
    "align": {"connector"},
    "finetune": {"connector", "language"},
    "contrastive": {"vision", "text", "vision_head", "text_head", "similarity"},
    "language_pretraining": {"language"},
    "autoencoder": {"first_stage", "discriminator"},
    "latent_diffusion": {"denoiser"},
}
GENERATES = re.compile(r"/model: (autoencoder|diffusion)\n")
TINY_EYE = "model.vision.architecture={hidden_size:32,intermediate_size:64,num_hidden_layers:2,num_attention_heads:2}"
TINY_TONGUE = TINY_EYE.replace("vision", "language")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=4, size=64)


def test_there_are_recipes():
    assert len(PUBLISHED) >= 10 and len(RECIPES) - len(PUBLISHED) >= 4


def lines_of(recipe: str) -> list[str]:
    return (CONF / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_page_with_a_header(recipe):
    lines = lines_of(recipe)
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert len(lines) <= 25
    assert header[0] == "# @package _global_"
    assert any(f"{line} ".startswith(f"#   mmlab train experiment={recipe} ") for line in header)
    assert len(header[1]) > 40, "the second line says what it reproduces"


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_published_recipe_says_its_numbers_and_how_far_it_was_tried(recipe):
    header = [line for line in lines_of(recipe) if line.startswith("#")]
    assert any(line.startswith("# Status: ") for line in header)
    assert any(re.search(r"\d+ epochs?, \d+, \de-\d", line) for line in header), "epochs, batch, learning rate"


def language_stand_ins(text: str) -> list[str]:
    """Small parts of a recipe of the vision-language family."""
    overrides = ["data.max_length=400"]
    if "/model: language_only" not in text:
        overrides += ["model/vision=clip_tiny", TINY_EYE]
    if "/model: dual_encoder" not in text:
        overrides += ["model/language=llama_tiny", TINY_TONGUE]
    return overrides


def pictures_stand_ins(text: str) -> list[str]:
    """Small parts of a recipe that generates pictures; a denoiser works on pixels and is told nothing."""
    overrides = ["data.size=32"]
    if "/model: autoencoder" in text:
        kind = "vq_tiny" if "/model/first_stage: vq" in text else "kl_tiny"
        return [
            *overrides,
            f"model/first_stage={kind}",
            "model/discriminator=patch_tiny",
            "model/perceptual=stand_in",
            "stage.adversarial_start=1",
        ]
    overrides += ["model/first_stage=identity", "model/denoiser=unet_tiny", "model/conditioner=none"]
    return [*overrides, "stage.trainable=[denoiser]", "data.latents=false", "sampler=ddim"]


# Their own settings of parts do not fit the stand-ins; the published ones are built in test_published_images.
OWN_PARTS = ("emoji/class", "ldm/imagenet_dit_xl_2", "ldm/imagenet_f4")


@pytest.mark.parametrize("recipe", OWN_PARTS)
def test_a_recipe_with_parts_of_its_own_composes(recipe):
    cfg = compose("train", [f"experiment={recipe}"])
    assert cfg.process is not None and "denoiser" in cfg.stage.trainable
    check_targets(cfg)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in OWN_PARTS])
def test_a_recipe_runs(tmp_path, monkeypatch, capsys, shapes, recipe):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(lines_of(recipe))
    overrides = [f"data.root={shapes}", "data.train=[{path: train}]", "data.val=[{path: val}]"]
    overrides += ["data.global_batch=4", "data.micro_batch=2", "data.workers=0"]
    overrides += ["trainer=cpu", "trainer.devices=1", "trainer.max_steps=2", "stage.init_from=[]", "run.name=it"]
    overrides += ["logger=none"]
    overrides += pictures_stand_ins(text) if GENERATES.search(text) else language_stand_ins(text)
    code = cli.main(["train", f"experiment={recipe}", *overrides])
    out, err = capsys.readouterr()
    assert code == 0, err
    done = json.loads((tmp_path / "runs" / "it" / "done.json").read_text())
    assert done["steps"] == 2 and 0 < done["train/loss"] < (
        1e5 if "reduction" in text or "autoencoder" in text else 200
    )
    stage = re.search(r"override /stage: (\w+)", text)
    assert stage, "a recipe chooses its stage"
    artifacts = sorted((tmp_path / "runs" / "it" / "artifacts").iterdir())
    assert {folder.name for folder in artifacts} == LEARNS[stage[1]]
    for folder in artifacts:
        weights = [path.stat().st_size for path in folder.glob("*.safetensors")]  # diffusers has a name of its own
        assert (folder / "card.json").is_file() and weights and min(weights) > 0
        assert str(folder.relative_to(tmp_path)) in out
    report = json.loads((tmp_path / "runs" / "it" / "data_report.json").read_text())
    assert report["train"]["seen"] == 8
