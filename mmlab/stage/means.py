"""Means of what a stage logs, over everything that belongs to a step or to a validation."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Means:
    """Averages named values over micro-batches and ranks, weighted by their samples: each sample counts once."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Count one micro-batch.

        Args:
            values: means over its samples; the same names until `finish`.
            samples: their number.
        """
        names = [*values, "samples"]
        row = torch.stack([value.detach().float() for value in values.values()]) * samples
        row = torch.cat([row, row.new_tensor([float(samples)])])
        if self._sums is not None and names != self._names:
            raise ValueError(f"means of {self._names} cannot take {names}")
        self._names = names
        self._sums = row if self._sums is None else self._sums + row

    def finish(self, world_size: int) -> dict[str, float]:
        """Return the means over all ranks since the last call, and start again; none where nothing was added."""
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        *totals, samples = sums.tolist()
        return {name: total / samples for name, total in zip(self._names, totals, strict=False)}
