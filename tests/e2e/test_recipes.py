"""Every recipe runs for two steps with small parts and synthetic images, through the real command.

Published vision-language recipes run with all their settings in `test_published_parts`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from mmlab import cli
from mmlab.config.compose import compose, conf_dir
from mmlab.data.sources.scenes import KINDS
from mmlab.model import config as models
from tests.e2e.test_published_parts import RECIPES as WITH_PARTS
from tests.stage.tiny_codes import make_maps
from tests.tiny_shapes import make_shapes

CONF = conf_dir() / "experiment"
RECIPES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
PUBLISHED = [
    name for name in RECIPES if re.fullmatch(r"llava/(v\d+|next)_.*|minigpt4/(?!.*_tiny).*|prismatic/.*", name)
]
# Stage → the parts that it saves, if these are not `stage.trainable`.
LEARNS = {
    "ProjectorAlignment": {"connector"},
    "EndToEndFinetuning": {"connector", "language"},
    "ContrastivePretraining": {"vision", "text", "vision_head", "text_head", "similarity"},
    "LanguagePretraining": {"language"},
    "QFormerPretraining": {"qformer", "words", "contrast", "match"},
    "QFormerAlignment": {"connector"},
    "AutoencoderTraining": {"first_stage", "discriminator"},
}
TINY = "architecture={hidden_size:32,intermediate_size:64,num_hidden_layers:2,num_attention_heads:2}"
TINY_VISION, TINY_LANGUAGE, TINY_QFORMER = (f"model.{part}.{TINY}" for part in ("vision", "language", "qformer"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=4, size=64)


def test_recipes_are_found():
    assert len(PUBLISHED) >= 16 and len(RECIPES) - len(PUBLISHED) >= 4


def lines_of(recipe: str) -> list[str]:
    return (CONF / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_on_a_page_with_a_header(recipe):
    lines = lines_of(recipe)
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert len(lines) <= 25
    assert header[0] == "# @package _global_"
    assert any(f"{line} ".startswith(f"#   mmlab train experiment={recipe} ") for line in header)
    assert len(header[1]) > 40, "the second line must state what it reproduces"


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_published_recipe_states_its_settings_and_status(recipe):
    header = [line for line in lines_of(recipe) if line.startswith("#")]
    assert any(line.startswith("# Status: ") for line in header)
    length = r"\d+ (epochs?|steps), batch \d+, lr \de-\d"
    assert any(re.search(length, line) for line in header), "epochs or steps, batch, learning rate"


def language_stand_ins(cfg: DictConfig) -> list[str]:
    """Small parts for a vision-language recipe."""
    overrides = ["data.max_length=400"]
    if "vision" in cfg.model:
        overrides += ["model/vision=clip_tiny", TINY_VISION]
    if cfg.model.get("qformer"):
        overrides += ["model/qformer=tiny", TINY_QFORMER]
    if "language" in cfg.model:
        overrides += ["model/language=llama_tiny", TINY_LANGUAGE]
    return overrides


def score_stand_ins(cfg: DictConfig, folder: Path) -> list[str]:
    """Synthetic questions for a recipe that scores its answers."""
    scores = {"questions": folder / "val", "metric": "exact", "max_new_tokens": 2, "limit": 4}
    scored = "answer_quality" in cfg.callbacks
    return [f"callbacks.answer_quality.{name}={value}" for name, value in scores.items()] if scored else []


def data_stand_ins(cfg: DictConfig) -> list[str]:
    """Synthetic dialogues with response types for a recipe that balances these."""
    return ["data.train=[{path: typed}]"] if cfg.data.get("balance") == "type" else []


def autoencoder_stand_ins(cfg: DictConfig) -> list[str]:
    """Small parts for a recipe of autoencoders."""
    kind = "vq_tiny" if OmegaConf.get_type(cfg.model.first_stage) is models.VQAutoencoderConfig else "kl_tiny"
    parts = [f"model/first_stage={kind}", "model/discriminator=patch_tiny", "model/perceptual=stand_in"]
    return ["data.size=32", *parts, "stage.adversarial_start=1"]


def diffusion_stand_ins(cfg: DictConfig, folder: Path, pipeline: Path) -> list[str]:
    """Small parts for a diffusion recipe: latents of `first_stage`, and a condition of the same kind; or a pipeline."""
    if cfg.model.denoiser.source is not None:
        own = [f"model.denoiser.source={pipeline}", "model.conditioner.max_length=12"]
        return ["data.size=16", "sampler.steps=2", *own]
    overrides = ["data.size=32", "data.latents=false", "sampler.steps=2"]
    parts = cfg.model
    overrides.append(
        f"model/denoiser={'dit_tiny' if OmegaConf.get_type(parts.denoiser) is models.DiTConfig else 'unet_tiny'}"
    )
    if OmegaConf.get_type(parts.first_stage) is not models.IdentityConfig:
        overrides += ["model/first_stage=kl_tiny", f"stage.init_from=[{folder / 'runs' / 'first_stage'}]"]
        overrides += ["model.first_stage.source=null", "model.first_stage.init=random"]
    if OmegaConf.get_type(parts.conditioner) is models.ClassConditionConfig:
        overrides.append(f"model.conditioner.classes=[{','.join(KINDS)}]")
    if OmegaConf.get_type(parts.conditioner) is models.TextConditionConfig:
        overrides += ["model/conditioner=text_tiny", "stage.trainable=[denoiser, conditioner]"]
    if "sample_quality" in cfg.callbacks:
        scores = {"features": folder / "runs" / "features", "pictures": folder / "val", "samples": 4}
        overrides += [f"callbacks.sample_quality.{name}={value}" for name, value in scores.items()]
    return overrides


def prior_stand_ins(cfg: DictConfig, folder: Path) -> list[str]:
    """Small parts for a recipe of code priors: codes of `vq`, and a condition of the same kind."""
    overrides = ["data.size=32", "data.latents=false", "model/first_stage=vq_tiny", "model/prior=gpt_tiny"]
    overrides += ["model.prior={depth:1,width:32,heads:2}", f"stage.init_from=[{folder / 'runs' / 'vq'}]"]
    overrides += ["model.first_stage.quantizer.codes=256"]
    if OmegaConf.get_type(cfg.model.conditioner) is models.ClassConditionConfig:
        overrides.append(f"model.conditioner.classes=[{','.join(KINDS)}]")
    if cfg.model.map_stage is not None:
        overrides += [f"data.root={folder / 'maps'}", "model/first_stage@model.map_stage=vq_tiny"]
        overrides += [f"model.map_stage.source={folder / 'runs' / 'vq' / 'artifacts' / 'first_stage'}"]
    return overrides


@pytest.fixture(scope="module")
def earlier_runs(shapes):
    """Runs that recipes start from: two first stages, and a vision encoder for scores."""
    for split in ("train", "val"):
        make_maps(shapes / "maps", 6, split, size=32)
    assert cli.main(["shards", "build", "instructions", str(shapes / "typed"), "--count", "6"]) == 0
    small = [f"data.root={shapes}", "data.global_batch=4", "data.micro_batch=4", "data.workers=0", "trainer=cpu"]
    small += ["data.train=[{path: train}]"]
    small += ["trainer.max_steps=1", f"run.root={shapes / 'runs'}", "logger=none"]
    more = {"features": ["model/vision=siglip_tiny", TINY_VISION, "data.max_length=400"]}
    firsts = (
        ("first_stage", "ldm/first_stage_kl_tiny"),
        ("vq", "taming/vqgan_tiny"),
        ("features", "llava/vision_tiny"),
    )
    for name, recipe in firsts:
        overrides = more.get(name, ["stage.adversarial_start=9"])
        assert cli.main(["train", f"experiment={recipe}", *small, *overrides, f"run.name={name}"]) == 0
    return shapes


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in WITH_PARTS])
def test_a_recipe_runs(tmp_path, monkeypatch, capsys, earlier_runs, stable_diffusion, recipe):
    monkeypatch.chdir(tmp_path)
    cfg = compose("train", [f"experiment={recipe}"])
    overrides = [f"data.root={earlier_runs}", "data.train=[{path: train}]", "data.val=[{path: val}]"]
    overrides += ["data.global_batch=4", "data.micro_batch=2", "data.workers=0"]
    overrides += ["trainer=cpu", "trainer.devices=1", "trainer.max_steps=2", "run.name=it", "logger=none"]
    overrides.append("stage.init_from=[]")
    kind: Any = OmegaConf.get_type(cfg.model)
    if kind is models.DiffusionModelConfig:
        overrides += diffusion_stand_ins(cfg, earlier_runs, stable_diffusion)
    elif kind is models.CodePriorModelConfig:
        overrides += prior_stand_ins(cfg, earlier_runs)
    else:
        overrides += autoencoder_stand_ins(cfg) if kind.kind == "reconstructs" else language_stand_ins(cfg)
        overrides += score_stand_ins(cfg, earlier_runs) + data_stand_ins(cfg)
    code = cli.main(["train", f"experiment={recipe}", *overrides])
    out, err = capsys.readouterr()
    assert code == 0, err
    done = json.loads((tmp_path / "runs" / "it" / "done.json").read_text())
    # Autoencoder losses may be sums over the values of an image.
    assert done["steps"] == 2 and 0 < done["train/loss"] < (1e5 if kind.kind == "reconstructs" else 200)
    stage = cfg.stage._target_.rsplit(".", 1)[1]
    artifacts = sorted((tmp_path / "runs" / "it" / "artifacts").iterdir())
    # A frozen part of a stand-in has random weights, which the run has to keep.
    kept = set(re.findall(r"'(\w+)' is frozen with the random weights", err))
    learns = LEARNS.get(stage, set(cfg.stage.trainable))
    if "discriminator" in learns and "discriminator" not in out:
        without = ("emoji/first_stage", "ldm/first_stage_kl_tiny", "photos/first_stage")
        assert recipe in without, "the loss of others has a discriminator"
        learns = learns - {"discriminator"}
    assert {folder.name for folder in artifacts} == learns | kept
    for folder in artifacts:
        # The file's name in diffusers differs, and two encoders have a folder each.
        weights = [path.stat().st_size for path in folder.rglob("*.safetensors")]
        assert (folder / "card.json").is_file() and weights and min(weights) > 0
        assert str(folder.relative_to(tmp_path)) in out
    report = json.loads((tmp_path / "runs" / "it" / "data_report.json").read_text())
    assert report["train"]["seen"] == 8
