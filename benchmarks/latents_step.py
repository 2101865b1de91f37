"""One training step of latent diffusion: from images, from cached latents, and as a plain loop with diffusers' parts.

Weights, samples, posterior samples, timesteps and noise are the same, so the three losses, which are printed, must
agree. A step covers the full cost of a batch: reading shards, decoding, encoding (if not cached), forward, backward.
Rounds are interleaved; medians are reported.

    python benchmarks/latents_step.py
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from mmlab.data.config import ImageDataConfig
from mmlab.data.index import ShardIndex
from mmlab.data.mixture import Source
from mmlab.data.reader import LocalBatches, OnePass
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import write_shards
from mmlab.data.sources.shapes import shapes
from mmlab.diffusion.config import DiffusionConfig
from mmlab.diffusion.process import Diffusion
from mmlab.keyed import normal
from mmlab.model.autoencoder import KLAutoencoder
from mmlab.model.conditioner import NoCondition
from mmlab.model.config import KLAutoencoderConfig, UNetConfig
from mmlab.model.denoiser import DiffusionModel, UNet
from mmlab.stage.config import LatentDiffusionConfig
from mmlab.stage.latent_cache import latents
from mmlab.stage.latent_diffusion import LatentDiffusion
from mmlab.training.config import AdamWConfig
from mmlab.training.optim import AdamW

ROUNDS, PASS, BATCH, SIDE = 9, 4, 32, 64
EYE = {"block_out_channels": [32, 48, 64, 64], "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4}
BODY = {"block_out_channels": [32, 64, 96], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}


def build() -> LatentDiffusion:
    first_stage = KLAutoencoder(KLAutoencoderConfig(init="random", architecture=EYE))
    first_stage.set_statistics(torch.zeros(4), torch.ones(4))
    model = DiffusionModel(first_stage, NoCondition(), partial(UNet, UNetConfig(architecture=BODY)))
    return LatentDiffusion(
        LatentDiffusionConfig(trainable=["denoiser"]),
        model,
        AdamW(AdamWConfig(lr=1e-4)),
        Diffusion(DiffusionConfig(schedule="linear")),
    )


def ours(stage: LatentDiffusion, index: ShardIndex, cached: bool) -> Callable[[int], Tensor]:
    data = ImageDataConfig(seed=0, size=SIDE, aspect="stretch", latents=cached)
    batches = LocalBatches([Source("shapes", index)], stage.collate(data), OnePass(len(index), BATCH), data)

    def step(n: int) -> Tensor:
        batch = batches[n % PASS]
        return stage.loss({**batch, "seeds": batch["seeds"].tolist()}, 0.0).mean()

    return step


def theirs(stage: LatentDiffusion, index: ShardIndex) -> Callable[[int], Tensor]:
    """The step of diffusers' training scripts, with our keyed random draws so that losses are comparable."""
    vae, unet = stage.model.first_stage.vae, stage.model.denoiser.unet
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    data = ImageDataConfig(seed=0, size=SIDE, aspect="stretch")
    batches = LocalBatches([Source("shapes", index)], stage.collate(data), OnePass(len(index), BATCH), data)

    def step(n: int) -> Tensor:
        batch = batches[n % PASS]
        seeds = batch["seeds"].tolist()
        with torch.no_grad():
            posterior = vae.encode(batch["pixel_values"] / 127.5 - 1).latent_dist
            x_0 = posterior.mean + posterior.std * normal(seeds, posterior.mean.shape[1:], "posterior")
        t, noise = stage.process.draw(seeds, x_0.shape[1:])
        return torch.nn.functional.mse_loss(unet(scheduler.add_noise(x_0, noise, t), t).sample, noise)

    return step


def main() -> None:
    torch.manual_seed(0)
    stage = build()
    stage.model.first_stage.eval()
    with tempfile.TemporaryDirectory() as folder:
        index, _ = write_shards(shapes(PASS * BATCH, size=SIDE), Path(folder) / "pictures", BATCH, quiet=True)
        encoded = latents(stage.model.first_stage, index, ImageSpec(SIDE, "stretch"))
        cache, _ = write_shards(encoded, Path(folder) / "latents", BATCH, quiet=True)
        steps = {
            "diffusers, encoding": theirs(stage, index),
            "ours, encoding": ours(stage, index, cached=False),
            "ours, cached latents": ours(stage, cache, cached=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        losses = {}
        for n in range(ROUNDS):
            for name, step in steps.items():
                start = time.perf_counter()
                loss = step(n)
                loss.backward()
                seconds[name].append(time.perf_counter() - start)
                losses[name] = loss.item()
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        best = min(seconds[name]) * 1000
        print(f"{name:<22} {median * 1000:>8.1f} ms a step (best {best:.1f}), loss {losses[name]:.6f}")
    print(
        f"cached latents: {medians['ours, encoding'] / medians['ours, cached latents']:.2f} times as fast as encoding"
    )


if __name__ == "__main__":
    main()
