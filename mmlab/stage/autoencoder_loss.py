"""The losses of adversarial autoencoders. Legend: B pictures, H/W pixels, C/h/w latents; pixels are in [-1, 1]."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmlab.config.errors import ConfigError, RunError, nearest
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


LOGIT_LIMIT = 1e4
"""The hinge loss asks for logits of ±1; far beyond it the discriminator only grows: reported runs went on to −10⁶."""
KL_LIMIT = 1e4
"""Nats per latent value. A weight of 1e-6 leaves some 10; this is a latent 140 standard deviations away."""
SETTLED_STEPS = 1000
"""Optimizer steps that a codebook has to begin with."""
LEAST_USE = 0.01
"""Perplexity of the codes, as a share of what they could have, below which they have collapsed."""


def refuse_blow_up(values: Mapping[str, float], step: int) -> None:
    """Check a step's means, before its gradients are applied.

    Args:
        values: `loss`, and where they are there `kl` (per latent value), `logits_real` and `logits_fake`.
        step: the optimizer step that they are of.

    Raises:
        RunError: a value that is not finite, a KL term or logits beyond their limits.
    """
    for name, value in values.items():
        if not isfinite(value):
            raise RunError(
                f"step {step}: train/{name} is {value}, so the weights would be lost; lower optim.lr, set "
                "trainer.gradient_clip_val=1, or train in trainer.precision=32-true."
            )
    if values.get("kl", 0.0) > KL_LIMIT:
        raise RunError(
            f"step {step}: the KL term is {values['kl']:.3g} nats per latent value (limit {KL_LIMIT:g}), so the "
            "latents run away; lower optim.lr or raise stage.kl_weight."
        )
    for name in ("logits_real", "logits_fake"):
        if abs(values.get(name, 0.0)) > LOGIT_LIMIT:
            raise RunError(
                f"step {step}: the discriminator's {name} are {values[name]:.3g} in the mean (limit {LOGIT_LIMIT:g}), "
                "so it has blown up; lower its optim.part_lr or stage.adversarial_weight, or start it later."
            )


def refuse_code_collapse(perplexity: float, codes: int, vectors: int, step: int) -> None:
    """Check how many codes a validation has used.

    Args:
        perplexity: of its codes.
        codes: that there are.
        vectors: latents that could choose.
        step: optimizer steps done; before `SETTLED_STEPS` nothing is refused.

    Raises:
        RunError: next to none are used.
    """
    least = max(2.0, LEAST_USE * min(codes, vectors))
    if step >= SETTLED_STEPS and perplexity < least:
        raise RunError(
            f"step {step}: the codebook has collapsed: its {codes} codes have a perplexity of {perplexity:.1f} in "
            f"validation (at least {least:.1f} is asked for); set model.first_stage.quantizer.revive_after=100, or "
            "normalize=true with a width of 4 to 8; of codes by Gumbel softmax, raise its kl_weight."
        )
