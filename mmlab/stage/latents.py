"""Latents of images, drawn from their posterior by the samples' seeds. Legend: B images, C/h/w of latents."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlab.keyed import normal
from mmlab.model.first_stage import FirstStage, Posterior, to_signed

STATISTICS_PICTURES = 4096
"""Images that the latents' statistics are measured on: a channel's mean is then known to 2 % of its deviation."""


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


@torch.no_grad()
def measure_latents(
    first_stage: FirstStage, batches: Iterable[Mapping[str, Any]], world_size: int, device: torch.device
) -> None:
    """Set the statistics of a first stage's latents, one draw of each image's posterior.

    Args:
        first_stage: is moved to the device, and put into eval mode.
        batches: of images, `ImageBatch`; the statistics do not depend on how many are in each.
        world_size: number of ranks, each with its own batches.
        device: of this rank.

    Raises:
        RunError: a channel that is constant or not finite.
    """
    first_stage.to(device).eval()
    moments = LatentMoments()
    for batch in batches:
        x = to_signed(batch["pixel_values"].to(device))
        moments.add(keyed_sample(first_stage.encode(x), batch["seeds"].tolist()))
    statistics = moments.finish(world_size, device)
    first_stage.set_statistics(statistics.mean, statistics.std)
