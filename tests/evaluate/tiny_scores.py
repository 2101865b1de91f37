"""Tiny parts for scores of images: a feature network, a lossless first stage, images, and runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import ShardWriter
from mmlab.model.first_stage import FirstStage, Posterior, to_signed
from mmlab.runs.run import finish
from mmlab.training.artifacts import describe_frozen, save_parts
from mmlab.training.filling import fill_parts
from tests.stage.tiny_diffusion import NAMES, _png

SIDE = 8


class Quadrants:
    """An image's mean colors in its quadrants, 12 features."""

    def __call__(self, pixels_N3HW: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(to_signed(pixels_N3HW), 2).flatten(1)

    def to(self, device: torch.device) -> "Quadrants":
        return self

    def describe(self) -> dict[str, Any]:
        return {"network": "quadrants", "hash": "0", "width": 12, "input": "as it is", "stand_in": True}


class Unshuffle(FirstStage):
    """Pixels sorted into channels: lossless apart from `blur`."""

    def __init__(self, blur: float = 0.0):
        super().__init__(channels=12, factor=2)
        self.blur = blur
        self.set_statistics(torch.full((12,), 0.1), torch.full((12,), 0.5))

    def encode(self, x_B3HW: Tensor) -> Posterior:
        return Posterior(F.pixel_unshuffle(x_B3HW, 2))

    def decode(self, z_BChw: Tensor) -> Tensor:
        pixels = F.pixel_shuffle(z_BChw, 2)
        return pixels + self.blur * (F.avg_pool2d(pixels, 3, 1, 1) - pixels)


def make_noise(root: Path, count: int, seed: int, side: int = SIDE) -> ShardIndex:
    """Random images with a class and a caption each."""
    drawn = torch.Generator().manual_seed(seed)
    with ShardWriter(root, 16, quiet=True) as writer:
        for i in range(count):
            pixels = torch.randint(256, (4, 4, 3), generator=drawn, dtype=torch.uint8)
            picture = Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.BICUBIC)
            record = {"class": NAMES[i % 3], "caption": f"number {i}"}
            writer.write(f"{root.name}{i:03d}", {"png": _png(picture), "json": record})
    return writer.index


def make_run(root: Path, name: str, overrides: list[str], learns: list[str]) -> Path:
    """A finished run with random weights; a trained first stage has latent statistics."""
    folder = root / name
    cfg = compose("train", [*overrides, f"run.root={root}", f"run.name={name}"])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(OmegaConf.to_container(cfg, resolve=True)))
    torch.manual_seed(0)
    model = build(cfg.model)
    if "first_stage" in learns:
        model.first_stage.set_statistics(torch.full((4,), 0.1), torch.full((4,), 0.5))
    fill_parts(model, [root / run for run in cfg.stage.init_from])
    save_parts(model, learns, folder / "artifacts", {"run": name}, describe_frozen(model, learns))
    finish(folder, {"steps": 1})
    return folder


CLASSES = ("model/conditioner=class", f"model.conditioner={{classes: [{', '.join(NAMES)}], width: 8}}")
TINY_KL = "{block_out_channels: [8, 8], layers_per_block: 1, norm_num_groups: 4, latent_channels: 4}"


def first_stage_run(root: Path, name: str = "first_stage") -> Path:
    """A run of stage=autoencoder on images of 8 px: latents of 4 x 4."""
    overrides = ["model=autoencoder", "model/discriminator=patch_tiny", "data=emoji", "stage=autoencoder"]
    small = [f"model.first_stage.architecture={TINY_KL}", "data.size=8", "stage.adversarial_weight=0"]
    return make_run(root, name, [*overrides, *small], ["first_stage"])


def diffusion_run(root: Path, name: str = "denoiser", conditioner: Sequence[str] = CLASSES) -> Path:
    """A run of stage=latent_diffusion on the latents of `first_stage_run`, conditioned on one of `NAMES`."""
    overrides = ["model=diffusion", "data=emoji", "stage=latent_diffusion", "process=cosine_v", "sampler=ddim"]
    parts = ["model/first_stage=kl_tiny", "model/denoiser=dit_tiny", *conditioner]
    small = [f"model.first_stage.architecture={TINY_KL}", "model.denoiser={depth: 1, width: 16, heads: 2}"]
    small += ["data.size=8", "sampler.steps=2"]
    learns = ["stage.init_from=[first_stage]", "stage.trainable=[denoiser, conditioner]"]
    return make_run(root, name, [*overrides, *parts, *small, *learns], ["denoiser", "conditioner"])


def contrastive_run(root: Path, tokenizer: Path, name: str = "eye") -> Path:
    """A run of stage=contrastive with an encoder of width 32 for images of 16 px."""
    small = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, image_size: 16}"
    overrides = ["experiment=llava/vision_tiny", "model/vision=siglip_tiny", f"model.vision.architecture={small}"]
    learns = ["vision", "text", "vision_head", "text_head", "similarity"]
    return make_run(root, name, [*overrides, f"model.text.tokenizer={tokenizer}"], learns)
