"""First stages: between pixels and the latents that a denoiser works on.

Legend: B images, H/W pixels, C/h/w channels and sides of latents. Pixels are in [-1, 1].
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
from mmlab.weights import finite

STATISTICS = ("latent_mean", "latent_std", "statistics_known")
"""Buffers of a first stage with the statistics of its latents."""


def to_signed(pixels: Tensor) -> Tensor:
    """Scale uint8 pixels to float32 in [-1, 1], of any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Round pixels in about [-1, 1] to the nearest uint8, of any shape; raises RunError if they are not finite."""
    return ((finite(pixels, "The model's images have").float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def for_encoding(pixels: Tensor) -> Tensor:
    """Pixels `[B, 3, H, W]` in the layout that an encoder reads fastest, by measurement.

    With channels last, convolutions without gradients on a CPU need not reorder their inputs: 128 px take 192 ms of a
    core of an AMD EPYC instead of 222, and the latents differ by 5e-6. With gradients it makes no difference.
    """
    fastest = pixels.device.type == "cpu" and not torch.is_grad_enabled()
    return pixels.contiguous(memory_format=torch.channels_last) if fastest else pixels


@dataclass(frozen=True)
class Posterior:
    """q(z|x): a normal distribution with a variance for each latent value, or a point.

    Attributes:
        mean: float32 `[B, C, h, w]`, raw latents (not normalized).
        logvar: float32 `[B, C, h, w]`, within [-30, 20]; None where the first stage is deterministic.
    """

    mean: Tensor
    logvar: Tensor | None = None

    def sample(self, noise_BChw: Tensor) -> Tensor:
        """Return raw latents `[B, C, h, w]` for standard normal noise (on any device)."""
        if self.logvar is None:
            return self.mean
        return self.mean + (0.5 * self.logvar).exp() * noise_BChw.to(self.mean)

    def kl(self) -> Tensor:
        """Return the KL divergence from the standard normal in nats, summed over an image's latents: float32 `[B]`."""
        if self.logvar is None:
            return torch.zeros(len(self.mean), device=self.mean.device)
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))


class FirstStage(nn.Module, ABC):
    """Base of first stages: shapes, and the statistics that normalize their latents for a denoiser.

    The statistics are buffers, so they are saved with the weights; they stay float32 when the module is cast. Sharded
    weights are gathered in their own precision: codes, and latents that are measured, do not bear rounding.

    Args:
        channels: C, of the latents.
        factor: pixels per latent along a side (f).
    """

    forward_methods: tuple[str, ...] = ("encode", "decode")
    exact = True

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
        """Whether the latents' statistics are known; otherwise they are 0 and 1, which has no effect."""
        return bool(self.statistics_known)

    def side(self, size: int) -> int:
        """Return the side of the latents of square images of `size` pixels.

        Raises:
            ConfigError: a size that does not divide by the factor.
        """
        if size % self.factor:
            raise ConfigError(f"data.size={size} must divide by the first stage's factor {self.factor}.")
        return size // self.factor

    @abstractmethod
    def encode(self, x_B3HW: Tensor) -> Posterior:
        """Return the posterior of raw latents of pixels in [-1, 1]; H and W are multiples of `factor`."""

    @abstractmethod
    def decode(self, z_BChw: Tensor) -> Tensor:
        """Decode raw latents to float32 pixels `[B, 3, H, W]` in about [-1, 1]."""

    def normalized(self, z_BChw: Tensor) -> Tensor:
        """Normalize raw latents to about mean 0 and standard deviation 1 in each channel, float32."""
        return (z_BChw.float() - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)

    def raw(self, z_BChw: Tensor) -> Tensor:
        """Invert `normalized`, float32."""
        return z_BChw.float() * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)

    def set_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Set the latents' mean and standard deviation per channel.

        Raises:
            RunError: a channel that is constant or not finite, which no denoiser could learn.
        """
        for channel, (mean, std) in enumerate(zip(mean_C.tolist(), std_C.tolist(), strict=True)):
            if not (abs(mean) < float("inf") and 1e-6 < std < float("inf")):
                raise RunError(
                    f"channel {channel} of the latents has mean {mean:.3g} and standard deviation {std:.3g}: "
                    "it carries no information, so the first stage has collapsed."
                )
        self.latent_mean.copy_(mean_C)
        self.latent_std.copy_(std_C)
        self.statistics_known.fill_(True)

    def forget_statistics(self) -> None:
        """Reset to 0 and 1, because the weights have changed."""
        self.latent_mean.zero_()
        self.latent_std.fill_(1.0)
        self.statistics_known.fill_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast to bf16 would shift all latents from those that were cached before.
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
    """Decoded latents, with what a training loss needs besides the pixels.

    Attributes:
        pixels: float32 `[B, 3, H, W]`.
        codes: the quantized latents; None without a codebook.
    """

    pixels: Tensor
    codes: Quantized | None = None


class Autoencoder(FirstStage):
    """A first stage with weights to train."""

    forward_methods = ("encode", "decode", "reconstruct")

    @abstractmethod
    def reconstruct(self, z_BChw: Tensor) -> Reconstruction:
        """Decode raw latents; gradients flow back to them, also through a quantizer."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, at which the adversarial gradient is balanced with the reconstruction's."""

    def after_step(self, step: int) -> None:
        """Called after each optimizer step with the number of steps done, on all ranks."""

    def describe(self) -> dict[str, Any]:
        """Return what a denoiser that was trained on these latents depends on, apart from the weights."""
        mean, std = self.latent_mean.tolist(), self.latent_std.tolist()
        return {"factor": self.factor, "latent_mean": mean, "latent_std": std}
