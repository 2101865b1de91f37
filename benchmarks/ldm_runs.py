"""Whole trainings of latent diffusion with the same pictures, weights, noise and steps: a loop as in diffusers' scripts
for text-to-image and unconditional training under accelerate, and `mmlab train`, encoding or from cached latents.

All weights are random and lie in folders that the sides load. The pictures are JPEG files of 256 px: a list of them for
the loop, shards for mmlab. The loop reads its noise and timesteps from a file with those that mmlab draws, so that the
losses agree.
"""

import io
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Outcome, tiny
from llava_runs import Clock, picture
from PIL import Image

WORKERS, CHANNELS = 1, 4
LR, CLIP, EMA, SEED = 1e-4, 1.0, 0.9999, 0
BETAS = 0.00085, 0.012  # of process=stable_diffusion


@dataclass
class Training:
    """A latent diffusion model and its run.

    Attributes:
        widths: of the levels of the first stage, each of which but the last halves the sides.
        unet: architecture of the denoiser.
        size: of the pictures in pixels.
        samples: of a step.
        steps: of the run, of which the first `warm` are not measured.
    """

    widths: list[int]
    unet: dict[str, Any]
    size: int = 128
    samples: int = 8
    steps: int = 24
    warm: int = 4

    def __post_init__(self) -> None:
        if tiny():
            count = len(self.unet["block_out_channels"])
            self.widths, self.size, self.samples, self.steps = [8] * 4, 8 * 2 ** (count - 1), 4, 6
            self.unet = {**self.unet, "block_out_channels": [16] * count, "attention_head_dim": 8, "norm_num_groups": 8}


def write_pictures(folder: Path, count: int) -> None:
    """Write JPEG files, and shards of them."""
    from mmlab.data.shard_files import write_shards
    from mmlab.data.tally import Tally

    rng = random.Random(1)
    (folder / "pictures").mkdir()

    def samples() -> Any:
        for number in range(count):
            name = f"sample-{number:05d}"
            jpeg = picture(rng)
            (folder / "pictures" / f"{name}.jpg").write_bytes(jpeg)
            yield name, {"jpg": jpeg, "json": {}}
        return Tally()

    write_shards(samples(), folder / "shards", 64, quiet=True)


def prepare(folder: Path, training: Training) -> None:
    """Write shards, files, weights, the order of the samples, and their noise and timesteps."""
    write_pictures(folder, training.samples * training.steps)
    _write_first_stage(folder, training)
    _record_start(folder, training)


def _write_first_stage(folder: Path, training: Training) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(SEED)
    depth = len(training.widths)
    blocks: Any = {
        "block_out_channels": training.widths,
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
    }
    vae: Any = AutoencoderKL(**blocks, layers_per_block=2, norm_num_groups=4 if tiny() else 8, latent_channels=CHANNELS)
    paths = sorted((folder / "pictures").iterdir())[:8]
    with torch.no_grad():
        x = torch.stack([pixels(Image.open(path).convert("RGB"), training.size) for path in paths])
        vae.register_to_config(scaling_factor=1 / vae.encode(x).latent_dist.mean.std().item())
    vae.save_pretrained(folder / "vae")


def _record_start(folder: Path, training: Training) -> None:
    import lightning

    from mmlab.cli import main
    from mmlab.config.compose import compose
    from mmlab.data.reader import GlobalBatches, LocalBatches
    from mmlab.keyed import normal
    from mmlab.stage.assembly import build_data, build_stage

    # The run whose first stage encodes pictures for the cache.
    if main(["train", *overrides(folder, training, "first_stage"), "trainer.max_steps=1"]):
        raise RuntimeError("The run of one step failed.")
    cfg = compose("train", overrides(folder, training, "contest"))
    lightning.seed_everything(cfg.seed, verbose=False)
    stage = build_stage(cfg)
    stage.model.denoiser.unet.save_pretrained(folder / "unet")
    data = build_data(cfg, stage)
    cut = GlobalBatches(training.samples, training.samples)
    batches = LocalBatches(data.train_sources, stage.collate(data.config), cut, data.config)
    keys, draws = [], []
    side = training.size // 2 ** (len(training.widths) - 1)
    for step in range(training.steps):
        batch = batches[step]
        keys += batch["keys"]
        seeds = batch["seeds"].tolist()
        t, noise = stage.process.draw(seeds, (CHANNELS, side, side))
        draws.append({"posterior": normal(seeds, noise.shape[1:], "posterior"), "noise": noise, "t": t})
    (folder / "order.json").write_text(json.dumps([f"{key}.jpg" for key in keys]))
    torch.save(draws, folder / "draws.pt")


def overrides(folder: Path, training: Training, run: str) -> list[str]:
    """The command line of `mmlab train`."""
    return [
        "model=diffusion",
        "model/first_stage=kl_f8",
        f"model.first_stage.source={folder}/vae",
        "model.first_stage.init=pretrained",
        *(f"++model.denoiser.architecture.{name}={value}" for name, value in training.unet.items()),
        "stage=latent_diffusion",
        "process=stable_diffusion",
        "callbacks=diffusion",
        f"callbacks.ema.decay={EMA}",
        "callbacks.samples=null",
        *common(folder, training.size, training.samples, training.steps),
        f"trainer.gradient_clip_val={CLIP}",
        f"optim.lr={LR}",
        f"run.name={run}",
    ]


def common(folder: Path, size: int, samples: int, steps: int) -> list[str]:
    """What all runs on these pictures have in their command line."""
    return [
        "+callbacks.clock._target_=llava_runs.Clock",
        "data=shapes_images",
        f"data.root={folder}",
        "data.train=[{path: shards}]",
        "data.val=[]",
        f"data.size={size}",
        f"data.global_batch={samples}",
        f"data.micro_batch={samples}",
        f"data.workers={WORKERS}",
        "trainer=cpu",
        "trainer.precision=32-true",
        f"trainer.max_steps={steps}",
        "trainer.log_every_n_steps=1",
        "optim.schedule=constant",
        "optim.warmup_ratio=0",
        f"run.root={folder}/runs",
        "run.fresh=true",
    ]


def train_ours(folder: Path, training: Training) -> Outcome:
    """`mmlab train` on pictures."""
    return trained(folder, overrides(folder, training, "contest"), training.samples, training.warm)


def train_ours_cached(folder: Path, training: Training) -> Outcome:
    """`mmlab shards encode`, then `mmlab train` on latents; encoding counts for the whole run, not for the rate."""
    from mmlab.cli import main

    where = ["--runs", str(folder / "runs"), "--shard-samples", "64", "--overwrite"]
    if code := main(["shards", "encode", "first_stage", str(folder / "shards"), str(folder / "latents"), *where]):
        raise RuntimeError(f"mmlab shards encode ended with {code}.")
    cached = ["data.latents=true", "data.train=[{path: latents, name: shards}]"]
    return trained(folder, [*overrides(folder, training, "contest"), *cached], training.samples, training.warm)


def trained(folder: Path, command: list[str], samples: int, warm: int) -> Outcome:
    """The outcome of `mmlab train` as the run `contest`."""
    from mmlab.cli import main
    from mmlab.runs.metrics_table import read_table

    Clock.ends.clear()
    if code := main(["train", *command]):
        raise RuntimeError(f"mmlab train ended with {code}.")
    rows = read_table(folder / "runs/contest/metrics.csv")
    losses = [float(rows[step]["train/loss"]) for step in sorted(rows) if "train/loss" in rows[step]]
    ends = Clock.ends
    return Outcome((len(ends) - warm) * samples, ends[-1] - ends[warm - 1], losses)


def pixels(image: Image.Image, size: int) -> torch.Tensor:
    """torchvision's Resize(size, BICUBIC), CenterCrop(size), ToTensor() and Normalize([0.5], [0.5])."""
    share = size / min(image.size)
    width, height = (round(side * share) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    array = np.array(image.crop((left, top, left + size, top + size)))
    return (torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255) - 0.5) / 0.5


class Pictures(torch.utils.data.Dataset):
    """The files in the order in which mmlab takes their samples."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder / "pictures", size
        self.names = json.loads((folder / "order.json").read_text())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        file = io.BytesIO((self.folder / self.names[n]).read_bytes())
        return {"pixel_values": pixels(Image.open(file).convert("RGB"), self.size)}


def train_theirs(folder: Path, training: Training) -> Outcome:
    """The loop of diffusers' scripts, with the options that `mmlab train` has here: EMA, clipping, a checkpoint."""
    from accelerate import Accelerator
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    accelerator = Accelerator(cpu=True, mixed_precision="no", log_with="tensorboard", project_dir=folder / "peer")
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae")
    unet: Any = UNet2DModel.from_pretrained(folder / "unet")
    vae.requires_grad_(False)
    unet.train()
    ema = EMAModel(unet.parameters(), decay=EMA, model_cls=UNet2DModel, model_config=unet.config)
    scheduler: Any = DDPMScheduler(1000, *BETAS, "scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0, eps=1e-8)
    loader = torch.utils.data.DataLoader(Pictures(folder, training.size), training.samples, num_workers=WORKERS)
    schedule = get_scheduler("constant", optimizer)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    accelerator.init_trackers("contest")
    draws = torch.load(folder / "draws.pt")
    ends, losses = [], []
    bar = tqdm(total=training.steps)
    batch: Any
    for step, batch in enumerate(loader):
        rows: Any = draws[step]
        with accelerator.accumulate(unet):
            posterior = vae.encode(batch["pixel_values"]).latent_dist
            latents = (posterior.mean + posterior.std * rows["posterior"]) * vae.config.scaling_factor
            noise, t = rows["noise"], rows["t"]
            prediction = unet(scheduler.add_noise(latents, noise, t), t).sample
            loss = torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
            gathered: Any = accelerator.gather(loss.repeat(training.samples))
            average = gathered.mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
            bar.update(1)
            accelerator.log({"train_loss": average}, step=step)
        bar.set_postfix(step_loss=loss.detach().item(), lr=schedule.get_last_lr()[0])
        losses.append(average)
        ends.append(time.perf_counter())
    accelerator.save_state(str(folder / "peer/checkpoint"))
    ema.copy_to(unet.parameters())
    accelerator.unwrap_model(unet).save_pretrained(folder / "peer/unet")
    accelerator.end_training()
    measured = (training.steps - training.warm) * training.samples
    return Outcome(measured, ends[-1] - ends[training.warm - 1], losses)
