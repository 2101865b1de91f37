"""Processes by their settings, and normal data, whose best denoiser and exact probability-flow ODE are known."""

import torch
from torch import Tensor

from mmlab.diffusion.config import DiffusionConfig, EDMConfig, FlowMatchingConfig
from mmlab.diffusion.edm import EDM
from mmlab.diffusion.flow import FlowMatching
from mmlab.diffusion.process import Diffusion, Level, NoiseProcess

MEAN, SPREAD = 0.4, 0.3


def choices(kind: type, name: str) -> tuple[str, ...]:
    """The options of a setting."""
    return kind.__dataclass_fields__[name].metadata["choices"]  # type: ignore[attr-defined]


def diffusion(schedule: str = "linear", **settings) -> Diffusion:
    return Diffusion(DiffusionConfig(schedule=schedule, **settings))


def flow_matching(**settings) -> FlowMatching:
    return FlowMatching(FlowMatchingConfig(**settings))


def edm(**settings) -> EDM:
    return EDM(EDMConfig(**settings))


class GaussianDenoiser:
    """The best denoiser of x_0 ~ N(MEAN, SPREAD²), for any process and target; it counts its calls."""

    def __init__(self, process: NoiseProcess, steps: int, spacing: str = "trailing"):
        self.process, self.calls = process, 0
        # Model times may be float32; the level of each is exact.
        self.levels = {process.model_time(torch.tensor(v.time)).item(): v for v in process.grid(steps, spacing)}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        level = self.levels[t[0].item()]
        total = (level.alpha * SPREAD) ** 2 + level.sigma**2
        noise = level.sigma * (x - level.alpha * MEAN) / total
        x_0 = MEAN + level.alpha * SPREAD**2 * (x - level.alpha * MEAN) / total
        a, b = {"epsilon": (0, 1), "x0": (1, 0), "v": self.process.velocity(level)}[self.process.target]
        return a * x_0 + b * noise


def exact(x: Tensor, here: Level, there: Level) -> Tensor:
    """Where the ODE takes x from one level to another: the deviation from the mean keeps its rank."""
    spread_here, spread_there = (((v.alpha * SPREAD) ** 2 + v.sigma**2) ** 0.5 for v in (here, there))
    return there.alpha * MEAN + (x - here.alpha * MEAN) * spread_there / spread_here
