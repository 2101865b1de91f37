"""When training an autoencoder has gone wrong for good: one plain sentence instead of days of compute."""

from collections.abc import Mapping
from math import isfinite

from mmlab.config.errors import RunError

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
