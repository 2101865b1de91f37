"""Next-token loss normalised by the supervised tokens of the whole global batch.

Legend: B rows, T tokens, S supervised places, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.data.batch import IGNORE


def supervised(labels_BT: Tensor, segment_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bool `[B, T]` places to predict from, int64 `[S]` the tokens to predict there).

    A place predicts the next token when that token has a label and belongs to the same segment.
    """
    keep = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep[:, :-1] = (labels_BT[:, 1:] != IGNORE) & (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1])
    targets = labels_BT[:, 1:][keep[:, :-1]]
    return keep, targets


def summed_cross_entropy(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Cross-entropy summed over the places, in fp32."""
    return F.cross_entropy(logits_SV.float(), targets_S, reduction="sum")


class TokenMean:
    """Turns the summed losses of all micro-batches and ranks into one mean over their tokens.

    A mean per micro-batch weights a token by the batch that it happened to be in: results then change with
    accumulation and ranks. Here every micro-batch backpropagates its sum, and the gradient is divided once,
    before clipping, by the number of supervised tokens in the whole global batch.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, loss_sum: Tensor, tokens: int) -> None:
        """Count one micro-batch: its summed loss and its number of supervised tokens."""
        value = loss_sum.detach().float()
        both = torch.stack([value, torch.full_like(value, float(tokens))])
        self.sums = both if self.sums is None else self.sums + both

    def finish(self, world_size: int) -> tuple[Tensor, Tensor]:
        """Return (mean loss per token, tokens) over all ranks since the last call, and start again."""
        sums = self.sums if self.sums is not None else torch.zeros(2)
        self.sums = None
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums[0] / sums[1].clamp(min=1), sums[1]


def rescale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients in place by a 0-dimensional tensor."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # type: ignore[attr-defined]
