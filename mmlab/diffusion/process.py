"""Noise processes: how an image becomes noise, what the denoiser predicts, and how the loss weighs each timestep.

Every process is x_t = α_t·x_0 + σ_t·ε with ε standard normal. The denoiser predicts its target, a mixture
a·x_0 + b·ε; two mixtures determine x_0 and ε, so targets convert into each other.

Coefficients are float64. Noising and conversions run in float32 (in float64 for float64 inputs) whatever the model's
dtype: in bfloat16, σ of the first timesteps would round to 0.

Legend: B samples, t the time of each sample `[B]`; sample tensors are `[B, …]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import DiffusionConfig, SamplerConfig
from mmlab.diffusion.schedule import alphas_bar, spaced, without_terminal_signal
from mmlab.keyed import Seeds, normal, uniform


class Level(NamedTuple):
    """A noise level: its time, and the weights of image and noise there (numbers, or float64 tensors `[B]`)."""

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
    ratio = there.sigma**2 / here.sigma**2
    return Step(scale, variance, scale * ratio, there.alpha * variance / here.sigma**2, variance * ratio)


class NoiseProcess(ABC):
    """Base class of noise processes; times are those returned by `draw` and `grid`.

    Attributes:
        target: what the denoiser predicts: `epsilon`, `x0` or `v`.
    """

    target: str
    config: Any = None

    @abstractmethod
    def level(self, t: Tensor) -> Level:
        """α and σ at times t, on its device."""

    @abstractmethod
    def grid(self, steps: int, spacing: str = SamplerConfig.spacing) -> list[Level]:
        """The `steps` levels that a sampler visits, noisiest first, followed by the clean level."""

    @abstractmethod
    def times(self, uniform_B: Tensor) -> Tensor:
        """Training times from numbers in [0, 1)."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """The time that the denoiser receives: an integer timestep, or a float32 of about that range."""

    @abstractmethod
    def velocity(self, level: Level) -> tuple[Any, Any]:
        """v as a mixture (a, b) of x_0 and ε."""

    @abstractmethod
    def ode(self, level: Level) -> tuple[Any, Any]:
        """(scale, clock) in which the probability-flow ODE is d(x/scale)/d(clock) = (x/scale − x_0)/clock.

        The clock is infinite where no image signal is left, so that a step from there must be Euler's.
        """

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """Weight of each sample's loss at times t, float32 `[B]`."""

    def draw(self, seeds: Seeds, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Training times `[B]` and float32 noise `[B, *shape]` on the CPU; each row depends on its seed only."""
        return self.draw_times(seeds), normal(seeds, shape, "noise")

    def draw_times(self, seeds: Seeds) -> Tensor:
        """The times of `draw`."""
        return self.times(uniform(seeds, "timestep"))

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), in float32 or more."""
        return self._mix(self.level(t)[1:], x_0, noise)

    def posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, …]` and float64 variance `[B]` of q(x_s | x_t, x_0), from times t to less noisy times s."""
        step = between(self.level(t), self.level(s))
        return self._mix((step.mean_x_t, step.mean_x_0), x_t, x_0), step.posterior_variance

    def target_of(self, x_0: Tensor, noise: Tensor, t: Tensor, target: str | None = None) -> Tensor:
        """The denoiser's target (or another `target`), in float32 or more."""
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
        """Loss of each sample, float32 `[B]`: the mean error over its values, times the weight of its time.

        Args:
            prediction: the denoiser's output.
            x_0, noise, t: clean sample, noise and time of its input.
            kind: `l2` (squared error) or `l1` (absolute error; latent diffusion on LSUN-Churches).
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
        """Weighted sum of sample tensors, in float32 or the parts' wider dtype."""
        dtype = torch.promote_types(torch.promote_types(parts[0].dtype, parts[1].dtype), torch.float32)
        sum_ = 0
        for weight, part in zip(weights, parts, strict=True):
            if isinstance(weight, Tensor):
                weight = weight.to(part.device, dtype).view(-1, *[1] * (part.dim() - 1))
            sum_ = sum_ + weight * part.to(dtype)
        return sum_  # type: ignore[return-value]


class Diffusion(NoiseProcess):
    """Discrete-time diffusion (DDPM): α = √ᾱ, σ = √(1−ᾱ); times are integers 0 … T−1, and −1 is the clean image.

    Under `zero_terminal_snr`, the min-SNR weight of the last timestep is 0.

    Args:
        config: settings.

    Raises:
        ConfigError: a schedule that does not end in noise, or `epsilon` with `zero_terminal_snr` (at SNR 0, the noise
            does not determine the image).
    """

    def __init__(self, config: DiffusionConfig):
        self.config, self.target = config, config.target
        bars = alphas_bar(config)
        self.alphas_bar = without_terminal_signal(bars) if config.zero_terminal_snr else bars
        if config.zero_terminal_snr and config.target == "epsilon":
            raise ConfigError("zero_terminal_snr=true needs target=v or target=x0: epsilon is undefined at SNR 0.")
        signal = self.alphas_bar[-1].sqrt().item()
        if signal > 0.1:
            raise ConfigError(
                f"schedule={config.schedule} with {config.timesteps} timesteps leaves {signal:.0%} of the image in its "
                "noisiest state, but sampling starts from pure noise: raise beta_end or set zero_terminal_snr=true."
            )
        # Time −1 indexes the last column: the clean image.
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

    def grid(self, steps: int, spacing: str = SamplerConfig.spacing) -> list[Level]:
        times = spaced(self.config.timesteps, steps, spacing)
        last = self.config.timesteps - 1
        if self.config.zero_terminal_snr and times[0] != last:
            raise ConfigError(
                f"spacing={spacing} with {steps} steps starts at timestep {times[0]}, but a model with "
                f"zero_terminal_snr starts from pure noise, at {last}: use spacing=trailing."
            )
        return [Level(t, *(c.item() for c in self.level(torch.tensor(t))[1:])) for t in [*times, -1]]

    def times(self, uniform_B: Tensor) -> Tensor:
        return (uniform_B * self.config.timesteps).long().clamp(max=self.config.timesteps - 1)

    def model_time(self, t: Tensor) -> Tensor:
        return t

    def velocity(self, level: Level) -> tuple[Any, Any]:
        return -level.sigma, level.alpha

    def ode(self, level: Level) -> tuple[Any, Any]:
        return level.alpha, level.sigma / level.alpha if level.alpha > 1e-3 else float("inf")

    def weight(self, t: Tensor) -> Tensor:
        """1, or min(SNR, γ) on the loss of x_0, converted to the loss of the target."""
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones(t.shape, device=t.device)
        level = self.level(t)
        a, b = self._mixture(level, None)
        per_x_0 = (level.sigma / (level.alpha * b - level.sigma * a)) ** 2
        return (self.snr(t).clamp(max=gamma) * per_x_0).float()
