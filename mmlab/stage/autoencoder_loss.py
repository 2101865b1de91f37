"""The losses of adversarial autoencoders. Legend: B images, H/W pixels, C/h/w latents; pixels are in [-1, 1]."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmlab.config.errors import RunError
from mmlab.model.first_stage import Posterior, Reconstruction
from mmlab.stage.config import AutoencoderTrainingConfig


@dataclass(frozen=True)
class Terms:
    """What the autoencoder minimizes, apart from the adversarial term.

    Attributes:
        reconstruction: pixel and perceptual distance, in the loss's reduction.
        penalty: weighted KL or codebook term, in the loss's reduction.
        logged: unweighted means per value, whatever the reduction: `pixel`, `perceptual`, and `kl` (nats) or `codebook`
            per latent value.
    """

    reconstruction: Tensor
    penalty: Tensor
    logged: dict[str, Tensor]


def autoencoder_loss(
    config: AutoencoderTrainingConfig,
    x_B3HW: Tensor,
    made: Reconstruction,
    posterior: Posterior,
    perceptual_B: Tensor,
) -> Terms:
    """Pixel distance + perceptual distance + KL or codebook term.

    Args:
        config: weights, and the reduction that they belong to.
        x_B3HW: images.
        made: their reconstructions.
        posterior: of their latents.
        perceptual_B: perceptual distances.
    """

    def reduced(summed_B: Tensor, values: int) -> Tensor:
        mean = summed_B.mean()
        return mean if config.reduction == "sum" else mean / values

    error = made.pixels.float() - x_B3HW
    pixels, latents = error[0].numel(), posterior.mean[0].numel()
    pixel_B = (error.abs() if config.pixel == "l1" else error.square()).sum((1, 2, 3))
    logged = {"pixel": pixel_B.mean() / pixels, "perceptual": perceptual_B.mean()}
    reconstruction = reduced(pixel_B + config.perceptual_weight * perceptual_B * pixels, pixels)
    penalty = torch.zeros_like(reconstruction)
    if posterior.logvar is not None:
        kl_B = posterior.kl()
        logged["kl"] = kl_B.mean() / latents
        penalty = penalty + config.kl_weight * reduced(kl_B, latents)
    if made.codes is not None:
        logged["codebook"] = made.codes.loss.mean() / latents
        penalty = penalty + config.codebook_weight * reduced(made.codes.loss, latents)
    return Terms(reconstruction, penalty, logged)


def generator_loss(discriminator: nn.Module, fake_B3HW: Tensor) -> Tensor:
    """Minus the mean logit of reconstructions; the gradient reaches the images, not the discriminator."""
    # Copies, so that its batch norms count each image once.
    buffers = {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
    learns = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    try:
        for parameter in learns:
            parameter.requires_grad_(False)
        return -functional_call(discriminator, buffers, (fake_B3HW,)).float().mean()
    finally:
        for parameter in learns:
            parameter.requires_grad_(True)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from logits of images and of reconstructions; 1 if it cannot tell them apart."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: nn.Parameter) -> Tensor:
    """The weight that makes both gradients at the last layer equally large (VQGAN, equation 7), from 0 to 10⁴.

    It is detached, and as published it is computed per micro-batch.
    """
    (first,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (second,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
    weight = first.float().norm() / (second.float().norm() + 1e-4)
    return weight.clamp(0, 1e4).detach()


LOGIT_LIMIT = 1e4
"""The hinge loss saturates at logits of ±1; far beyond, the discriminator diverges (reported runs reached −10⁶)."""
KL_LIMIT = 1e4
"""Nats per latent value. A weight of 1e-6 leaves about 10; this is a latent 140 standard deviations away."""
SETTLED_STEPS = 1000
"""Optimizer steps before a codebook is checked."""
LEAST_USE = 0.01
"""Perplexity of the codes, as a share of the highest possible one, below which they have collapsed."""


def refuse_blow_up(values: Mapping[str, float], step: int) -> None:
    """Check a step's means, before its gradients are applied.

    Args:
        values: `loss` and, if computed, `kl` (per latent value), `logits_real` and `logits_fake`.
        step: their optimizer step.

    Raises:
        RunError: a KL term or logits beyond their limits.
    """
    if values.get("kl", 0.0) > KL_LIMIT:
        raise RunError(
            f"step {step}: the KL term is {values['kl']:.3g} nats per latent value (limit {KL_LIMIT:g}), so the "
            "latents diverge; lower optim.lr or raise stage.kl_weight."
        )
    for name in ("logits_real", "logits_fake"):
        if abs(values.get(name, 0.0)) > LOGIT_LIMIT:
            raise RunError(
                f"step {step}: the discriminator's mean {name} is {values[name]:.3g} (limit {LOGIT_LIMIT:g}), so it "
                "diverges; lower its optim.part_lr or stage.adversarial_weight, or start it later."
            )


def refuse_code_collapse(perplexity: float, codes: int, vectors: int, step: int) -> None:
    """Check how many codes a validation has used.

    Args:
        perplexity: of the used codes.
        codes: size of the codebook.
        vectors: latents that were quantized.
        step: finished optimizer steps; nothing is checked before `SETTLED_STEPS`.

    Raises:
        RunError: almost no codes are used.
    """
    least = max(2.0, LEAST_USE * min(codes, vectors))
    if step >= SETTLED_STEPS and perplexity < least:
        raise RunError(
            f"step {step}: the codebook has collapsed: its {codes} codes have a perplexity of {perplexity:.1f} in "
            f"validation, less than {least:.1f}; set model.first_stage.quantizer.revive_after=100, or "
            "normalize=true with a width of 4 to 8; with Gumbel softmax, raise its kl_weight."
        )
