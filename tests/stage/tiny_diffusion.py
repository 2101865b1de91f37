"""Diffusion models small enough to be trained in a second, and their data: pictures, and latents of the same ones."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmlab.data.config import AspectBucketsConfig, ImageDataConfig, SourceConfig
from mmlab.data.index import ShardIndex
from mmlab.data.module import ShardDataModule
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter, write_shards
from mmlab.diffusion.config import DiffusionConfig
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.model.conditioner import ClassCondition, Conditioner
from mmlab.model.config import ClassConditionConfig
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.first_stage import FirstStage, Posterior
from mmlab.stage.config import LatentDiffusionConfig
from mmlab.stage.latent_cache import latents
from tests.stage.tiny_stage import make_stage

NAMES = ("circle", "square", "star")
SIZE = 8


class TinyFirstStage(FirstStage):
    """Patches of 2 x 2 pixels to two channels and back, linearly, with a posterior that is not a point."""

    def __init__(self, measured: bool = True):
        super().__init__(channels=2, factor=2)
        self.there = nn.Conv2d(3, 4, 2, 2)
        self.back = nn.ConvTranspose2d(2, 3, 2, 2)
        if measured:
            self.set_statistics(torch.tensor([0.1, -0.2]), torch.tensor([0.3, 0.7]))

    def encode(self, x_B3HW: Tensor) -> Posterior:
        mean, logvar = self.there(x_B3HW).chunk(2, 1)
        return Posterior(mean, logvar - 1)

    def decode(self, z_BChw: Tensor) -> Tensor:
        return self.back(z_BChw)


class TinyDenoiser(nn.Module):
    def __init__(self, channels: int, vector_width: int | None = None, context_width: int | None = None):
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.told = nn.Linear(vector_width or context_width or 1, 8)
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, time_B: Tensor, condition: dict[str, Tensor]) -> Tensor:
        hidden = self.first(x_BCHW) + self.time(time_B[:, None].float() / 1000)[..., None, None]
        if condition:
            told = condition["vector"] if "vector" in condition else condition["context"].mean(1)
            hidden = hidden + self.told(told)[..., None, None]
        return self.last(torch.tanh(hidden))


def diffusion_model(first_stage: FirstStage | None = None, conditioner: Conditioner | None = None) -> DiffusionModel:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    return DiffusionModel(
        first_stage or TinyFirstStage(),
        conditioner or ClassCondition(ClassConditionConfig(classes=NAMES, width=6, dropout=0.5)),
        TinyDenoiser,
    )


def diffusion_stage(model: DiffusionModel | None = None, process: NoiseProcess | None = None, **options: Any) -> Any:
    config = LatentDiffusionConfig(**{"trainable": ["denoiser", "conditioner"], **options})
    return make_stage(config, model or diffusion_model(), process=process or Diffusion(DiffusionConfig()))


def make_pictures(root: Path, count: int = 16, split: str = "s") -> ShardIndex:
    """Pictures of one colour in their left half and another in their right, each with a class and a caption."""
    with ShardWriter(root / split, 6, quiet=True) as writer:
        for i in range(count):
            picture = Image.new("RGB", (SIZE, SIZE), (15 * i % 256, 90, 40))
            picture.paste((10, 15 * i % 256, 200), (0, 0, SIZE // 2, SIZE))
            record = {"class": NAMES[i % 3], "caption": f"a {NAMES[i % 3]} number {i}"}
            writer.write(f"{split}{i}", {"png": _png(picture), "json": record})
    return writer.index


def make_latents(root: Path, model: DiffusionModel, index: ShardIndex, **options: Any) -> ShardIndex:
    """The same samples as `mmlab shards encode` writes them."""
    encoded = latents(model.first_stage.eval(), index, ImageSpec(SIZE, "crop"), **options)
    return write_shards(encoded, root / index.root.name, 6, quiet=True)[0]


def image_data(
    stage: Any,
    index: ShardIndex,
    latents: bool = False,
    flip: bool = True,
    global_batch: int = 8,
    micro_batch: int = 8,
    aspect: str = "crop",
    size: int = SIZE,
    buckets: AspectBucketsConfig | None = None,
) -> ShardDataModule:
    """Training data of a stage; a source of pictures and one of their cache share a name, hence seeds and order."""
    sources = [SourceConfig(path=str(index.root), name="s")]
    batch = {"global_batch": global_batch, "micro_batch": micro_batch, "seed": 0}
    images = {
        "size": size,
        "aspect": aspect,
        "flip": flip,
        "latents": latents,
        "buckets": buckets or AspectBucketsConfig(),
    }
    data = ImageDataConfig(train=sources, val=sources, **batch, **images)
    return ShardDataModule(data, stage.collate(data))


def _png(picture: Image.Image) -> bytes:
    import io

    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()
