"""Averages of weights with power-function profiles, and the fit of any such profile by others (EDM2, arXiv 2312.02696).

After t steps the average is (γ + 1) / t^(γ + 1) times the integral of s^γ weights(s) over s from 0 to t (section 3.1).
Its profile stretches with the training, so its width, the profile's standard deviation over t, stays: `exponent` gives
the γ of a width. Profiles of several widths and steps span others, which are found by least squares (section 3.2 and
appendix C).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 12**-0.5
"""Width of the uniform average, γ = 0."""
TOLERANCE = 0.1
"""Largest error of a fit that is used, see `fit`."""
_ROUNDING = 1e-12
"""Eigenvalues of the normalized Gram matrix below this share of the largest one are rounding errors."""


class Profile(NamedTuple):
    """The profile of the average of a width after some steps."""

    step: int
    width: float


@cache
def exponent(width: float) -> float:
    """The γ ≥ 0 with width² = (γ + 1) / ((γ + 2)² (γ + 3)), which decreases with γ.

    Args:
        width: σ_rel in the paper, above 0 and at most `WIDEST`.
    """
    low, high = 0.0, 1 / width
    for _ in range(100):  # until the bounds are neighboring numbers
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if wider else (low, middle)
    return low


def share(step: int, gamma: float) -> float:
    """How far the average moves towards the weights after a step, counted from 1: 1 − (1 − 1/step)^(γ + 1).

    The average is then the weights of each step times the integral of the profile over that step.
    """
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def fit(profiles: Sequence[Profile], target: Profile) -> tuple[list[float], float]:
    """Fit a profile by a weighted sum of others, with weights whose sum is 1.

    Args:
        profiles: at least one.
        target: of any width and step.

    Returns:
        The weights, and the root mean square error over the root mean square of the target.
    """
    steps = torch.tensor([profile.step for profile in [*profiles, target]], dtype=torch.float64) / target.step
    gammas = torch.tensor([exponent(profile.width) for profile in [*profiles, target]], dtype=torch.float64)
    products = _products(steps, gammas)
    norms = products.diagonal().sqrt()
    products = products / norms / norms[:, None]
    gram, towards, ones = products[:-1, :-1], products[:-1, -1], norms[-1] / norms[:-1]
    # In the basis in which the Gram matrix is 1, the best weights of the sum 1 are a projection.
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _ROUNDING * values[-1]
    basis = vectors[:, kept] / values[kept].sqrt()
    best, normal = basis.T @ towards, basis.T @ ones
    weights = basis @ (best + normal * (1 - normal @ best) / (normal @ normal))
    error = (1 - 2 * towards @ weights + weights @ gram @ weights).clamp(min=0).sqrt()
    return (weights * ones).tolist(), float(error)


def reachable(profiles: Sequence[Profile], step: int) -> tuple[float, float]:
    """The narrowest and the widest profile after `step` that `profiles`, some of that step, fit within `TOLERANCE`."""
    widths, ends = [profile.width for profile in profiles if profile.step == step], []
    for inside, outside in ((min(widths), 0.0), (max(widths), WIDEST)):
        while abs(outside - inside) > 1e-4:
            middle = (inside + outside) / 2
            fits = fit(profiles, Profile(step, middle))[1] <= TOLERANCE
            inside, outside = (middle, outside) if fits else (inside, middle)
        ends.append(inside)
    return math.ceil(ends[0] * 1000) / 1000, math.floor(ends[1] * 1000) / 1000


def _products(steps_N: Tensor, gammas_N: Tensor) -> Tensor:
    """The integrals of the products of each two profiles, N x N in float64."""
    own, other = gammas_N[:, None], gammas_N
    shorter = torch.minimum(steps_N[:, None], steps_N)
    powers = own * (shorter / steps_N[:, None]).log() + other * (shorter / steps_N).log()
    scale = (own + 1) * (other + 1) / (own + other + 1)
    return scale * powers.exp() * shorter / (steps_N[:, None] * steps_N)
