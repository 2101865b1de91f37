"""How much a Fréchet distance is too high because the sets of images are finite (Chong & Forsyth, arXiv 1911.07023).

The expectation of the distance from N samples is FID∞ + C/N, as long as N is several times the width of the features.
"""

from statistics import fmean

import torch

from mmlab.evaluate.pictures.fid import ENOUGH, FeatureSet, Moments, Root, frechet_from

POINTS = 15
"""Subsets that the line is fitted to, as in the paper's code."""
FEWEST = 8
"""Images below which nothing is extrapolated."""


def extrapolated(pictures: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """The distance of unlimited samples, and what the finite sets add to it; empty for fewer than `FEWEST` images.

    A line in 1/n is fitted to the distances of random subsets of n samples, from N/2 to N. (The paper starts at N/10,
    with N = 50,000. Fewer samples than features are no longer on the line.) The subsets do not depend on a seed.

    Returns:
        `fid_infinity`: the paper's FID∞, of unlimited samples and these references.
        `fid_bias`: the distance minus `fid_infinity`.
        `fid_reference_bias`: the same with the roles of the sets exchanged, what few references add.
    """
    if min(len(pictures), len(reference)) < FEWEST:
        return {}
    at_infinity, whole = _intercept(pictures, reference)
    reference_at_infinity, reference_whole = _intercept(reference, pictures)
    return {
        "fid_infinity": at_infinity,
        "fid_bias": whole - at_infinity,
        "fid_reference_bias": reference_whole - reference_at_infinity,
    }


def _intercept(shrinking: FeatureSet, fixed: FeatureSet) -> tuple[float, float]:
    """(the intercept of the line, the distance of all images) over subsets of `shrinking`."""
    features_NF, root = shrinking.features, Root(fixed.moments.mean, fixed.moments.covariance)
    count, draw = len(shrinking), torch.Generator().manual_seed(0)
    sizes = torch.linspace(count / 2, count, POINTS).round().long().unique().tolist()
    values = []
    for size in sizes:
        moments = Moments()
        moments.add(features_NF[torch.randperm(count, generator=draw)[:size]])
        values.append(frechet_from(root, moments.mean, moments.covariance))
    # Not by LAPACK, whose least squares differ in the last bit between two calls.
    x = [1 / size for size in sizes]
    mean_x, mean_y = fmean(x), fmean(values)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, values, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return mean_y - slope * mean_x, values[-1]


def caution(scores: dict[str, float], *sets: FeatureSet) -> str | None:
    """A sentence with the size of the bias if a set has too few images for the width of its features, else None.

    Args:
        scores: with `fid`, and what `extrapolated` returns.
        *sets: both sets of images.
    """
    fewest = min(sets, key=len)
    width = len(fewest.moments.mean)
    if len(fewest) >= ENOUGH * width:
        return None
    size = ""
    if scores.get("fid_bias", 0) > 0:  # the estimate of a tiny set may be anything
        rough = "very roughly " if len(fewest) < 2 * width else ""
        # The estimate of a small bias may be negative.
        added, few = (max(0.0, scores[name]) for name in ("fid_bias", "fid_reference_bias"))
        size = (
            f" by {rough}{added:.3g} (few samples) and {few:.3g} (few references); unlimited samples would have "
            f"{scores['fid_infinity']:.4g}"
        )
    return (
        f"The Fréchet distance is biased upwards{size}: {len(fewest):,} images are few for features of width {width:,} "
        f"({ENOUGH * width:,} or more are recommended); compare it only with numbers from as many images, or use the "
        "kernel distance, which is unbiased."
    )
