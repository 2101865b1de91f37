"""Precision and recall of samples: whether they are realistic, and whether they cover the real images.

Kynkäänniemi et al., arXiv 1904.06991. Legend: N, M images, F width of a feature.
"""

import torch
from torch import Tensor

NEIGHBOURS = 3
"""k of the paper's experiments."""
CHUNK = 1024


def precision_recall(made_NF: Tensor, real_MF: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """`precision`: share of the samples inside the manifold of the real images; `recall`: the reverse.

    The manifold of a set is the union of balls around its features, each with the distance to its k-th nearest neighbor
    in the set as radius (algorithm 1). Both numbers depend on N and M; the paper has 50,000 of each.

    Returns:
        Both numbers; nothing if a set has at most k images.
    """
    if min(len(made_NF), len(real_MF)) <= k:
        return {}
    # Centered float64: the matrix product of `_distances` would lose small distances far from the origin.
    center_F = real_MF.cpu().double().mean(0)
    made, real = made_NF.cpu().double() - center_F, real_MF.cpu().double() - center_F
    return {"precision": _share_inside(made, real, k), "recall": _share_inside(real, made, k)}


def _share_inside(x_NF: Tensor, y_MF: Tensor, k: int) -> float:
    """Share of the x that lie in the manifold of the y."""
    # An image is its own nearest neighbor.
    radii_M = torch.cat([_distances(part, y_MF).kthvalue(k + 1, dim=1).values for part in y_MF.split(CHUNK)])
    inside = [(_distances(part, y_MF) <= radii_M).any(1) for part in x_NF.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def _distances(x_NF: Tensor, y_MF: Tensor) -> Tensor:
    return torch.cdist(x_NF, y_MF, compute_mode="use_mm_for_euclid_dist")
