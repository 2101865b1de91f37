"""The losses of adversarial autoencoders. Legend: B pictures, H/W pixels, C/h/w latents; pixels are in [-1, 1]."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmlab.config.errors import ConfigError, nearest
from mmlab.model.first_stage import Posterior, Reconstruction

REDUCTIONS = ("sum", "mean")
PIXELS = ("l1", "l2")


@dataclass(frozen=True)
class Terms:
    """What the autoencoder minimises, apart from the adversarial term.

    Attributes:
        reconstruction: pixel and perceptual distance, in the loss's reduction.
        penalty: what holds the latents: weighted KL or codebook term, in the loss's reduction.
        shown: unweighted means per value, whatever the reduction: `pixel`, `perceptual`, and `kl` (nats) or `codebook`
            per latent value.
    """

    reconstruction: Tensor
    penalty: Tensor
    shown: dict[str, Tensor]


@dataclass(frozen=True)
class AutoencoderLoss:
    """Pixel distance + perceptual distance + KL or codebook term, with the reduction that the weights belong to.

    Attributes:
        reduction: `sum` over a picture's values, then the mean over pictures (LDM's KL autoencoders; the perceptual
            distance counts for every pixel value); or `mean` over values too (VQGAN). A KL weight w of `sum` is
            w · (latent values / pixel values) of `mean`.
        pixel: `l1` or `l2`.
        perceptual_weight, kl_weight, codebook_weight: of the terms.

    Raises:
        ConfigError: an unknown reduction or pixel distance.
    """

    reduction: str = "sum"
    pixel: str = "l1"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("reduction", REDUCTIONS), ("pixel", PIXELS)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"stage.{name}={value} is none of {', '.join(known)}.{nearest(value, known)}")

    def __call__(self, x_B3HW: Tensor, made: Reconstruction, posterior: Posterior, perceptual_B: Tensor) -> Terms:
        """The terms for pictures, their reconstructions, the latents' posterior and perceptual distances."""
        error = made.pixels.float() - x_B3HW
        pixels, latents = error[0].numel(), posterior.mean[0].numel()
        pixel_B = (error.abs() if self.pixel == "l1" else error.square()).sum((1, 2, 3))
        shown = {"pixel": pixel_B.mean() / pixels, "perceptual": perceptual_B.mean()}
        reconstruction = self._reduced(pixel_B + self.perceptual_weight * perceptual_B * pixels, pixels)
        penalty = torch.zeros_like(reconstruction)
        if posterior.logvar is not None:
            kl_B = posterior.kl()
            shown["kl"] = kl_B.mean() / latents
            penalty = penalty + self.kl_weight * self._reduced(kl_B, latents)
        if made.codes is not None:
            shown["codebook"] = made.codes.loss.mean() / latents
            penalty = penalty + self.codebook_weight * self._reduced(made.codes.loss, latents)
        return Terms(reconstruction, penalty, shown)

    def _reduced(self, summed_B: Tensor, values: int) -> Tensor:
        mean = summed_B.mean()
        return mean if self.reduction == "sum" else mean / values


def generator_loss(discriminator: nn.Module, fake_B3HW: Tensor) -> Tensor:
    """Minus the mean logit of reconstructions; the gradient reaches the pictures, not the discriminator."""
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    # Copies, so that its batch norms count each picture once.
    fixed |= {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
    return -functional_call(discriminator, fixed, (fake_B3HW,)).float().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from logits of pictures and of reconstructions; 1 where it cannot tell them apart."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: nn.Parameter) -> Tensor:
    """The weight at which both terms pull equally at the last layer (VQGAN, equation 7), from 0 to 10⁴, no gradient.

    It is of the micro-batch at hand, as published.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
    weight = of_reconstruction.float().norm() / (of_generator.float().norm() + 1e-4)
    return weight.clamp(0, 1e4).detach()
