"""The noise process: how a picture becomes noise, what the denoiser predicts, and how much each timestep counts.

Every process here is x_t = α_t·x_0 + σ_t·ε with ε standard normal. The denoiser predicts a mixture a·x_0 + b·ε, its
target; two mixtures determine x_0 and ε, so all targets convert into each other.

Coefficients are float64. Noising and conversions run in float32 (in float64 for float64 inputs) whatever the model's
dtype: in bfloat16, σ of the first timesteps would round to 0.

Legend: B samples, t the time of each sample `[B]`; tensors of samples are `[B, …]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, nearest
from mmlab.diffusion.schedule import alphas_bar, spaced, without_terminal_signal
from mmlab.keyed import Seeds, normal, uniform


class Level(NamedTuple):
    """A noise level: its time, and the weights of picture and noise there (numbers, or float64 tensors `[B]`)."""

    time: Any
    alpha: Any
    sigma: Any


class Step(NamedTuple):
    """Coefficients between two levels s < t (less noise < more); numbers, or float64 tensors `[B]`."""

    scale: Any  # x_t = scale·x_s + √variance·noise
    variance: Any
    mean_x_t: Any  # E[x_s | x_t, x_0] = mean_x_t·x_t + mean_x_0·x_0
    mean_x_0: Any
    posterior_variance: Any


def between(here: Level, there: Level) -> Step:
    """The forward step q(x_t|x_s) and the posterior q(x_s|x_t, x_0) from t = `here` to s = `there`."""
    scale = here.alpha / there.alpha
    variance = here.sigma**2 - (scale * there.sigma) ** 2
    kept = there.sigma**2 / here.sigma**2
    return Step(scale, variance, scale * kept, there.alpha * variance / here.sigma**2, variance * kept)


class NoiseProcess(ABC):
    """What all processes share; times are those that `draw` and `grid` give.

    Args:
        target: what the denoiser predicts.

    Raises:
        ConfigError: a target that this process does not have.
    """

    targets: tuple[str, ...]

    def __init__(self, target: str):
        self.target = target
        if target not in self.targets:
            names = ", ".join(self.targets)
            raise ConfigError(f"target={target!r} is none of {names}.{nearest(target, self.targets)}")

    @abstractmethod
    def level(self, t: Tensor) -> Level:
        """α and σ at times t, on its device."""

    @abstractmethod
    def grid(self, steps: int, spacing: str = "trailing") -> list[Level]:
        """The `steps` levels that a sampler visits, noisiest first, and the clean one after them."""

    @abstractmethod
    def times(self, uniform_B: Tensor) -> Tensor:
        """Training times from numbers in [0, 1)."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What the denoiser receives as its time: an integer timestep, or a float32 in 0 … 1000."""

    @abstractmethod
    def velocity(self, level: Level) -> tuple[Any, Any]:
        """v as a mixture (a, b) of x_0 and ε."""

    @abstractmethod
    def ode(self, level: Level) -> tuple[Any, Any]:
        """(scale, clock) in which the probability-flow ODE is d(x/scale)/d(clock) = (x/scale − x_0)/clock.

        The clock is infinite where a step must be Euler's: nothing of the picture is left there.
        """

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """Weight of each sample's loss at times t, float32 `[B]`."""

    def draw(self, seeds: Seeds, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Training times `[B]` and float32 noise `[B, *shape]` that depend on each sample's seed alone, on the CPU."""
        return self.times(uniform(seeds, "timestep")), normal(seeds, shape, "noise")

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), in float32 or more."""
        return self._mix(self.level(t)[1:], x_0, noise)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, …]` and float64 variance `[B]` of q(x_s | x_t, x_0), from times t to less noisy times s."""
        step = between(self.level(t), self.level(s))
        return self._mix((step.mean_x_t, step.mean_x_0), x_t, x_0), step.posterior_variance

    def target_of(self, x_0: Tensor, noise: Tensor, t: Tensor, target: str | None = None) -> Tensor:
        """What the denoiser should predict (or another `target`), in float32 or more."""
        return self._mix(self._mixture(self.level(t), target), x_0, noise)

    def split(self, prediction: Tensor, x_t: Tensor, t: Tensor, target: str | None = None) -> tuple[Tensor, Tensor]:
        """(x_0, ε) that a prediction of the denoiser's target (or another `target`) implies."""
        return self.split_at(prediction, x_t, self.level(t), target)

    def split_at(self, prediction: Tensor, x_t: Tensor, level: Level, target: str | None = None):
        """`split` at one level, whose coefficients may be numbers."""
        a, b = self._mixture(level, target)
        determinant = level.alpha * b - level.sigma * a
        x_0 = self._mix((b / determinant, -level.sigma / determinant), x_t, prediction)
        return x_0, self._mix((level.alpha / determinant, -a / determinant), prediction, x_t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio α²/σ² at times t, float64 `[B]`."""
        level = self.level(t)
        return (level.alpha / level.sigma) ** 2

    def loss(self, prediction: Tensor, x_0: Tensor, noise: Tensor, t: Tensor, kind: str = "l2") -> Tensor:
        """Loss of each sample, float32 `[B]`: its error's mean over the sample's values, times its weight.

        Args:
            prediction: of the denoiser.
            x_0, noise, t: what it was shown a mixture of.
            kind: `l2` squares the error, `l1` takes its absolute value (latent diffusion on LSUN-Churches).
        """
        error = prediction.float() - self.target_of(x_0, noise, t).float()
        error = error.abs() if kind == "l1" else error.square()
        return self.weight(t) * error.flatten(1).mean(1)

    def _mixture(self, level: Level, target: str | None) -> tuple[Any, Any]:
        """The target as (a, b) of a·x_0 + b·ε."""
        match target or self.target:
            case "epsilon":
                return 0.0, 1.0
            case "x0":
                return 1.0, 0.0
            case "v":
                return self.velocity(level)
            case other:
                raise ValueError(f"target={other!r} is none of epsilon, x0, v.")

    def _mix(self, weights: tuple[Any, Any], *parts: Tensor) -> Tensor:
        """Weighted sum of tensors of samples, in float32 or the parts' wider dtype."""
        dtype = torch.promote_types(torch.promote_types(parts[0].dtype, parts[1].dtype), torch.float32)
        sum_ = 0
        for weight, part in zip(weights, parts, strict=True):
            if isinstance(weight, Tensor):
                weight = weight.to(part.device, dtype).view(-1, *[1] * (part.dim() - 1))
            sum_ = sum_ + weight * part.to(dtype)
        return sum_  # type: ignore[return-value]


class Diffusion(NoiseProcess):
    """Discrete-time diffusion (DDPM): α = √ᾱ, σ = √(1−ᾱ); times are integers 0 … T−1, and −1 is the clean picture.

    Args:
        schedule: `linear` in β, `scaled_linear` (linear in √β) or `cosine`.
        timesteps: T.
        beta_start: first β; DDPM's or latent diffusion's where it is None, and none for `cosine`.
        beta_end: last β, likewise.
        zero_terminal_snr: rescale the schedule so that the last timestep is noise alone, as sampling starts.
        target: `epsilon`, `x0`, or `v` = α·ε − σ·x_0. A sampler finds x_0 from `epsilon` by dividing by α: under
            `cosine`, whose last α is 5e-5, clip x_0 or predict another target.
        min_snr_gamma: γ of the min-SNR weight (5 in its paper); None weighs every timestep 1. The weight is 0 at
            the last timestep under `zero_terminal_snr`.

    Raises:
        ConfigError: a schedule that does not end in noise, `epsilon` with `zero_terminal_snr` (at SNR 0 the
            noise says nothing of the picture), or an argument out of its range.
    """

    targets = ("epsilon", "x0", "v")

    def __init__(
        self,
        schedule: str = "linear",
        timesteps: int = 1000,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
        target: str = "epsilon",
        min_snr_gamma: float | None = None,
    ):
        super().__init__(target)
        bars = alphas_bar(schedule, timesteps, beta_start, beta_end)
        self.schedule, self.timesteps, self.min_snr_gamma = schedule, timesteps, min_snr_gamma
        self.beta_start, self.beta_end = beta_start, beta_end
        self.zero_terminal_snr = zero_terminal_snr
        self.alphas_bar = without_terminal_signal(bars) if zero_terminal_snr else bars
        if zero_terminal_snr and target == "epsilon":
            raise ConfigError("zero_terminal_snr=true needs target=v or target=x0: epsilon is undefined at SNR 0.")
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ConfigError(f"min_snr_gamma={min_snr_gamma:g} must be above 0, or null for a weight of 1.")
        left = self.alphas_bar[-1].sqrt().item()
        if left > 0.1:
            raise ConfigError(
                f"schedule={schedule} with {timesteps} timesteps leaves {left:.0%} of the picture in its noisiest "
                "state, while sampling starts from noise alone: raise beta_end, or set zero_terminal_snr=true."
            )
        # Time −1 indexes the last column: the clean picture.
        bars = torch.cat([self.alphas_bar, torch.ones(1, dtype=torch.float64)])
        self._tables = {torch.device("cpu"): torch.stack([bars.sqrt(), (1 - bars).sqrt()])}

    @property
    def betas(self) -> Tensor:
        """β of each timestep, float64 `[T]`."""
        return 1 - self.alphas_bar / torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])

    def level(self, t: Tensor) -> Level:
        if t.device not in self._tables:
            dtype = torch.float32 if t.device.type == "mps" else torch.float64  # mps has no float64
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device, dtype)
        alpha, sigma = self._tables[t.device][:, t]
        return Level(t, alpha, sigma)

    def grid(self, steps: int, spacing: str = "trailing") -> list[Level]:
        times = spaced(self.timesteps, steps, spacing)
        if self.zero_terminal_snr and times[0] != self.timesteps - 1:
            raise ConfigError(
                f"spacing={spacing} with {steps} steps starts at timestep {times[0]}, but a model with "
                f"zero_terminal_snr starts from noise alone, at {self.timesteps - 1}: use spacing=trailing."
            )
        return [Level(t, *(c.item() for c in self.level(torch.tensor(t))[1:])) for t in [*times, -1]]

    def times(self, uniform_B: Tensor) -> Tensor:
        return (uniform_B * self.timesteps).long().clamp(max=self.timesteps - 1)

    def model_time(self, t: Tensor) -> Tensor:
        return t

    def velocity(self, level: Level) -> tuple[Any, Any]:
        return -level.sigma, level.alpha

    def ode(self, level: Level) -> tuple[Any, Any]:
        return level.alpha, level.sigma / level.alpha if level.alpha > 1e-3 else float("inf")

    def weight(self, t: Tensor) -> Tensor:
        """1, or min(SNR, γ) on the loss of x_0, carried over to the loss of the target."""
        if self.min_snr_gamma is None:
            return torch.ones(t.shape, device=t.device)
        level = self.level(t)
        a, b = self._mixture(level, None)
        per_x_0 = (level.sigma / (level.alpha * b - level.sigma * a)) ** 2
        return (self.snr(t).clamp(max=self.min_snr_gamma) * per_x_0).float()
