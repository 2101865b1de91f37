"""Next-token loss, normalized by the supervised tokens of the whole global batch.

Every micro-batch backpropagates its sum, and the gradient is divided once, before clipping, by the number of supervised
tokens in the global batch: results depend neither on accumulation nor on ranks.

Legend: B rows, T tokens, S supervised positions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmlab.data.batch import IGNORE
from mmlab.weights import local


def supervised(labels_BT: Tensor, segment_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bool `[B, T]` positions to predict from, int64 `[S]` the tokens to predict there).

    A position predicts the next token if that token has a label and belongs to the same segment.
    """
    keep = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep[:, :-1] = (labels_BT[:, 1:] != IGNORE) & (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1])
    targets = labels_BT[:, 1:][keep[:, :-1]]
    return keep, targets


def rescale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place by a 0-dimensional tensor."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # type: ignore[attr-defined]
