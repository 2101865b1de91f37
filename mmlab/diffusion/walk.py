"""The loop shared by all samplers: levels, predictions, fresh noise, and a report of each step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from mmlab.diffusion.config import SamplerConfig
from mmlab.diffusion.guidance import Clip
from mmlab.diffusion.process import Level, NoiseProcess
from mmlab.keyed import Seeds, normal

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t `[B, …]`, time `[B]`) → the process's target. It gets float32 (float64 for float64 samples) and the time of
`NoiseProcess.model_time`; its output may have any dtype."""


@dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        number: 1 … steps.
        steps: number of steps in the run.
        x: the samples after the step.
        x_0: the clean samples predicted in the step.
    """

    number: int
    steps: int
    x: Tensor
    x_0: Tensor


@dataclass(frozen=True)
class Source:
    """Samples to start from instead of noise (SDEdit, arXiv 2108.01073), all of them or a part.

    Attributes:
        x_0: clean samples, `[B, …]`.
        skipped: levels of the grid that are left out; sampling starts at the next one.
        mask: 1 where samples are drawn and 0 where `x_0` is kept, `[B, 1, …]`; None: drawn everywhere.
    """

    x_0: Tensor
    skipped: int = 0
    mask: Tensor | None = None

    def start(self, level: Level, noise: Tensor) -> Tensor:
        """The state at the first level: as in diffusers, noise alone where a mask leaves out no level."""
        return noise if self.mask is not None and not self.skipped else self.noised(level, noise)

    def noised(self, level: Level, noise: Tensor) -> Tensor:
        return level.alpha * self.x_0 + level.sigma * noise


class Options(TypedDict, total=False):
    """Keyword arguments of every sampler.

    Attributes:
        rng: source of the noise that a sampler adds: one seed per sample (sample i then depends only on its seed, not
            on the rest of the batch) or a torch generator.
        spacing: `trailing` (default), `linspace` or `leading`; see `spaced`.
        clip: bounds on the predicted clean sample.
        on_step: called after each step, for progress bars and denoising strips.
        source: samples to start from. Where its mask keeps them, each step ends with them at its noise level, with the
            noise that the run started from (diffusers' inpainting with a model that is not made for it).
    """

    rng: "Seeds | torch.Generator | None"
    spacing: str
    clip: Clip | None
    on_step: Callable[[Step], None] | None
    source: Source | None


class Walk:
    """One sampling run from noise to samples: iterate over its pairs of levels, and `move` once in each.

    Args:
        model: the denoiser.
        process: the one that the denoiser was trained with.
        x: the starting noise; the run uses float32, or float64 if x has it.
        steps: number of levels to visit.
        **options: see `Options`.
    """

    def __init__(
        self,
        model: Denoiser,
        process: NoiseProcess,
        x: Tensor,
        steps: int,
        rng: "Seeds | torch.Generator | None" = None,
        spacing: str = SamplerConfig.spacing,
        clip: Clip | None = None,
        on_step: Callable[[Step], None] | None = None,
        source: Source | None = None,
    ):
        self.levels = process.grid(steps, spacing)
        self.x = x.to(torch.promote_types(x.dtype, torch.float32))
        self._noise, self._source = self.x, source
        if source is not None:
            self.levels = self.levels[source.skipped :]
            self.x = source.start(self.levels[0], self._noise)
        self._model, self._process, self._rng, self._clip, self._on_step = model, process, rng, clip, on_step
        self._number = 0

    def __iter__(self) -> Iterator[tuple[Level, Level]]:
        return pairwise(self.levels)

    def predict(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """(x_0, ε) according to the denoiser. If x_0 is clipped, ε follows, so that both still add up to x."""
        t = self._process.model_time(torch.full((len(x),), level.time, device=x.device))
        x_0, noise = self._process.split_at(self._model(x, t).to(x.dtype), x, level)
        if self._clip is not None:
            x_0 = self._clip(x_0)
            noise = (x - level.alpha * x_0) / level.sigma
        return x_0, noise

    def fresh(self) -> Tensor:
        """Standard normal noise for the current step.

        Raises:
            ValueError: the run has neither seeds nor a generator.
        """
        if self._rng is None:
            raise ValueError("This sampler adds noise and needs rng: one seed per sample, or a torch.Generator.")
        if isinstance(self._rng, torch.Generator):
            noise = torch.randn(self.x.shape, dtype=self.x.dtype, generator=self._rng, device=self._rng.device)
        else:
            noise = normal(self._rng, self.x.shape[1:], f"sampling step {self._number}")
        return noise.to(self.x.device, self.x.dtype)

    def move(self, x: Tensor, x_0: Tensor) -> None:
        """End the step: `x` are the new samples, `x_0` the clean samples predicted in the step."""
        self._number += 1
        if self._source is not None and (mask := self._source.mask) is not None:
            x = mask * x + (1 - mask) * self._source.noised(self.levels[self._number], self._noise)
        self.x = x
        if self._on_step is not None:
            self._on_step(Step(self._number, len(self.levels) - 1, x, x_0))


class Trajectory:
    """Collects evenly spaced states of a run, including the last one; pass it to a sampler as `on_step`.

    Args:
        frames: states to collect, at most one per step.

    Attributes:
        numbers: steps of the collected states, 1 … steps.
        x, x_0: see `Step`; on the CPU.
    """

    def __init__(self, frames: int = 8):
        self.frames = frames
        self.numbers: list[int] = []
        self.x: list[Tensor] = []
        self.x_0: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        # Frame k of n is taken at the first step that reaches k/n of the way.
        if step.number * self.frames // step.steps > (step.number - 1) * self.frames // step.steps:
            self.numbers.append(step.number)
            self.x.append(step.x.cpu())
            self.x_0.append(step.x_0.cpu())
