"""Means of logged values over all micro-batches and ranks of a step or a validation."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Means:
    """Averages named values over micro-batches and ranks, each token or sample counted once.

    A mean of the micro-batches' means would weight a token by the batch that it is in, and depend on accumulation and
    ranks.

    Args:
        *names: of the values, for ranks that may have nothing to add; otherwise those of `add`.
    """

    def __init__(self, *names: str) -> None:
        self._names = list(names)
        self._sums: Tensor | None = None

    def add(self, sums: Mapping[str, Tensor], count: int) -> None:
        """Count one micro-batch.

        Args:
            sums: of its values, 0-dimensional; the same names until `finish`.
            count: tokens or samples that they are sums over.
        """
        names, values = list(sums), [value.detach().float() for value in sums.values()]
        row = torch.stack([*values, torch.full_like(values[0], float(count))])
        if self._sums is not None and names != self._names:
            raise ValueError(f"means of {self._names} cannot take {names}")
        self._names = names
        self._sums = row if self._sums is None else self._sums + row

    def add_means(self, means: Mapping[str, Tensor], count: int) -> None:
        """Count one micro-batch by its means."""
        self.add({name: value.detach().float() * count for name, value in means.items()}, count)

    def finish(self, world_size: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return (means, count) over all ranks since the last call, and start again; zeros if nothing was added."""
        sums, self._sums = self._sums, None
        if sums is None:
            sums = torch.zeros(len(self._names) + 1)
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        means = sums[:-1] / sums[-1].clamp(min=1)
        return dict(zip(self._names, means, strict=True)), sums[-1]
