"""Latents of images, drawn from their posterior by the samples' seeds. Legend: B images, C/h/w of latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlab.keyed import normal
from mmlab.model.first_stage import Posterior


def keyed_sample(posterior: Posterior, seeds: Sequence[int]) -> Tensor:
    """Raw latents `[B, C, h, w]`, one draw of each posterior, the same for a seed in every stage."""
    if posterior.logvar is None:
        return posterior.mean
    return posterior.sample(normal(seeds, posterior.mean.shape[1:], "posterior"))


def with_seeds_on_host(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its seeds as a list: numbers are drawn on the host, and reading them back would synchronize."""
    return {**batch, "seeds": torch.as_tensor(batch["seeds"]).tolist()}


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of raw latents per channel, over all images and positions: float64 `[C]` each.

    Attributes:
        mean, std: used by `FirstStage.normalized`.
        kurtosis: fourth moment over squared variance; 3 for normal numbers.
    """

    mean: Tensor
    std: Tensor
    kurtosis: Tensor


class LatentMoments:
    """Sums powers of latents, in fp64: the result does not depend on how images are split into batches."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, z_BChw: Tensor) -> None:
        """Count the latents of some images."""
        z_C = z_BChw.detach().transpose(0, 1).flatten(1).cpu().double()
        powers = [z_C.pow(n).sum(1) for n in range(5)]
        sums = torch.stack(powers)
        self._sums = sums if self._sums is None else self._sums + sums

    def finish(self, world_size: int, device: torch.device) -> LatentStatistics:
        """Return the statistics over all ranks since the last call, and start again.

        Args:
            world_size: number of ranks.
            device: where ranks exchange tensors.
        """
        assert self._sums is not None, "no latents were added"
        sums, self._sums = self._sums, None
        if world_size > 1:
            on_device = sums.to(device)
            torch.distributed.all_reduce(on_device)
            sums = on_device.cpu()
        mean, p2, p3, p4 = sums[1:] / sums[0]
        variance = (p2 - mean.square()).clamp(min=0)
        fourth = p4 - 4 * mean * p3 + 6 * mean.square() * p2 - 3 * mean.pow(4)
        return LatentStatistics(mean, variance.sqrt(), fourth / variance.square())
