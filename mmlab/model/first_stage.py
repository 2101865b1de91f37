"""First stages: between pixels and the latents that a denoiser works on.

Legend: B pictures, H/W pixels, C/h/w channels and sides of latents. Pixels are in [-1, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError, RunError
from mmlab.model.quantizer import Quantized, cast_all_but


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 pixels → float32 in [-1, 1], any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in about [-1, 1] → the nearest uint8, any shape."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Posterior:
    """q(z|x): a normal distribution with a variance of its own for each latent value, or a point.

    Attributes:
        mean: float32 `[B, C, h, w]`, raw latents (not normalised).
        logvar: float32 `[B, C, h, w]`, within [-30, 20]; None where the first stage is deterministic.
    """

    mean: Tensor
    logvar: Tensor | None = None

    def sample(self, noise_BChw: Tensor) -> Tensor:
        """Raw latents `[B, C, h, w]`, given standard normal noise (on any device)."""
        if self.logvar is None:
            return self.mean
        return self.mean + (0.5 * self.logvar).exp() * noise_BChw.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, in nats summed over a picture's latents: float32 `[B]`."""
        if self.logvar is None:
            return torch.zeros(len(self.mean), device=self.mean.device)
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))


class FirstStage(nn.Module, ABC):
    """What all first stages share: shapes, and the statistics that make their latents fit a denoiser.

    The statistics are buffers, so they are saved with the weights; casting the module leaves them in float32.

    Args:
        channels: C, of the latents.
        factor: pixels per latent along a side (f).
    """

    latent_mean: Tensor
    latent_std: Tensor
    statistics_known: Tensor

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.channels = channels
        self.factor = factor
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.register_buffer("statistics_known", torch.tensor(False))

    @property
    def measured(self) -> bool:
        """Whether the latents' statistics are known; else they stand at 0 and 1, and normalise nothing."""
        return bool(self.statistics_known)

    def side(self, size: int) -> int:
        """Side of the latents of square pictures with `size` pixels a side.

        Raises:
            ConfigError: a size that does not divide by the factor.
        """
        if size % self.factor:
            raise ConfigError(f"data.size={size} must divide by the first stage's factor {self.factor}.")
        return size // self.factor

    @abstractmethod
    def encode(self, x_B3HW: Tensor) -> Posterior:
        """Pixels in [-1, 1] → the posterior of their raw latents; H and W are multiples of `factor`."""

    @abstractmethod
    def decode(self, z_BChw: Tensor) -> Tensor:
        """Raw latents → float32 pixels `[B, 3, H, W]`, about [-1, 1]."""

    def normalized(self, z_BChw: Tensor) -> Tensor:
        """Raw latents → latents of about mean 0 and standard deviation 1 in each channel, float32."""
        return (z_BChw.float() - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def raw(self, z_BChw: Tensor) -> Tensor:
        """The inverse of `normalized`, float32."""
        return z_BChw.float() * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Take the latents' mean and standard deviation per channel.

        Raises:
            RunError: a channel that is constant or not finite; no denoiser could learn it.
        """
        for channel, (mean, std) in enumerate(zip(mean_C.tolist(), std_C.tolist(), strict=True)):
            if not (abs(mean) < float("inf") and 1e-6 < std < float("inf")):
                raise RunError(
                    f"channel {channel} of the latents has mean {mean:.3g} and standard deviation {std:.3g}: "
                    "it says nothing about a picture, so the first stage has collapsed."
                )
        self.latent_mean.copy_(mean_C)
        self.latent_std.copy_(std_C)
        self.statistics_known.fill_(True)

    def forget_statistics(self) -> None:
        """Go back to 0 and 1: the latents are of other weights now."""
        self.latent_mean.zero_()
        self.latent_std.fill_(1.0)
        self.statistics_known.fill_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast to bf16 would shift all latents against those that were cached before it.
        return cast_all_but(self, ("latent_mean", "latent_std"), partial(super()._apply, fn, recurse))


class Identity(FirstStage):
    """Pixel space: the latents are the pixels, and need no statistics."""

    def __init__(self) -> None:
        super().__init__(channels=3, factor=1)
        self.statistics_known.fill_(True)

    def encode(self, x_B3HW: Tensor) -> Posterior:
        return Posterior(x_B3HW)

    def decode(self, z_BChw: Tensor) -> Tensor:
        return z_BChw.float()


@dataclass(frozen=True)
class Reconstruction:
    """Decoded latents, with what a training loss needs beside the pixels.

    Attributes:
        pixels: float32 `[B, 3, H, W]`.
        codes: what the latents were quantised to; None without a codebook.
    """

    pixels: Tensor
    codes: Quantized | None = None


class Autoencoder(FirstStage):
    """A first stage that learns."""

    @abstractmethod
    def reconstruct(self, z_BChw: Tensor) -> Reconstruction:
        """Decode raw latents; the gradient reaches them, through a quantizer too."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The weight that makes pixels: where an adversarial gradient is weighed against the reconstruction's."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step with the number of steps done, on all ranks."""
