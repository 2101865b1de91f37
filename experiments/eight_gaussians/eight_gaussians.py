"""Train a small denoiser on eight Gaussians, sample with every sampler, plot and measure: eight_gaussians.py OUT."""

import json
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mmlab.diffusion.config import DiffusionConfig, FlowMatchingConfig, SamplerConfig
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.keyed import normal, uniform

STEPS, BATCH, COUNT = 2500, 256, 2000
RADIUS, SPREAD = 1.5, 0.1
SAMPLERS = {
    "DDPM, 100 steps": Sampler(SamplerConfig(name="ddpm", steps=100)),
    "DDIM, 50": Sampler(SamplerConfig(name="ddim", steps=50)),
    "DPM-Solver++, 20": Sampler(SamplerConfig(name="dpmpp_2m", steps=20)),
    "Euler, 50": Sampler(SamplerConfig(name="euler", steps=50)),
    "Heun, 20": Sampler(SamplerConfig(name="heun", steps=20)),
}


def data(seeds: range) -> Tensor:
    """One point of the eight Gaussians per seed, `[B, 2]`."""
    angle = (uniform(seeds, "mode") * 8).floor() * math.pi / 4
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1).float() + SPREAD * normal(seeds, (2,), "point")


class Denoiser(nn.Module):
    """An MLP with sinusoidal embeddings of the time, which lies in 0 … 1000."""

    def __init__(self, width: int = 128, waves: int = 16):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-3, -1, waves))
        sizes = [2 + 2 * waves, width, width, width]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t[:, None] * self.frequencies
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))


def train(process: NoiseProcess) -> tuple[nn.Module, float]:
    """Train a denoiser with `process`; return it and the mean of its last 200 losses."""
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    points = data(range(20_000))
    losses = []
    for step in range(STEPS):
        seeds = range(step * BATCH, (step + 1) * BATCH)
        x_0 = points[torch.tensor(seeds) % len(points)]
        t, noise = process.draw(seeds, (2,))
        prediction = model(process.add_noise(x_0, noise, t), process.model_time(t))
        loss = process.loss(prediction, x_0, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), sum(losses[-200:]) / 200


def distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-1 distance between two point sets of equal size, over 64 directions."""
    angles = torch.arange(64) * math.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


def on_a_mode(points: Tensor) -> float:
    """Fraction of points within three standard deviations of a mode's center."""
    angles = torch.arange(8) * math.pi / 4
    centers = RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
    return (torch.cdist(points, centers).min(1).values < 3 * SPREAD).float().mean().item()


def draw(panels: dict[str, Tensor], path: Path, side: int = 240, columns: int = 4) -> None:
    """Save a grid of scatter plots."""
    rows = math.ceil(len(panels) / columns)
    sheet = Image.new("L", (columns * side, rows * (side + 20)), 255)
    pen = ImageDraw.Draw(sheet)
    for i, (title, points) in enumerate(panels.items()):
        left, top = i % columns * side, i // columns * (side + 20)
        pen.text((left + 8, top + 4), title, fill=0)
        pen.rectangle((left + 2, top + 20, left + side - 3, top + side + 17), outline=200)
        pixels = (points / 2.6 + 1) * side / 2
        for x, y in pixels[(points.abs() < 2.55).all(1)].tolist():
            pen.ellipse((left + x - 1, top + 20 + y - 1, left + x + 1, top + 20 + y + 1), fill=70)
    sheet.save(path, optimize=True)


def main(out: Path) -> None:
    """Train, sample, plot, and print the figures."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    truth, other = data(range(10**9, 10**9 + COUNT)), data(range(2 * 10**9, 2 * 10**9 + COUNT))
    noise = normal(range(COUNT), (2,), "start")
    panels = {"data": truth, "noise": noise}
    figures: dict[str, float] = {"data": distance(truth, other), "noise": distance(truth, noise)}
    for name, process in (
        ("diffusion", Diffusion(DiffusionConfig(schedule="cosine", target="v"))),
        ("flow", FlowMatching(FlowMatchingConfig())),
    ):
        model, figures[f"{name}_loss"] = train(process)
        for title, sampler in SAMPLERS.items():
            points = sampler(model, process, noise, rng=range(COUNT))
            panels[f"{name}: {title}"] = points
            figures[f"{name}_{sampler.name}"] = distance(truth, points)
            figures[f"{name}_{sampler.name}_on_a_mode"] = on_a_mode(points)
    draw(panels, out / "eight_gaussians.png")
    figures["seconds"] = time.perf_counter() - start
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
