"""Latents of pictures, drawn from their posterior by the samples' seeds. Legend: B pictures, C/h/w of latents."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlab.diffusion.noise import normal
from mmlab.model.first_stage import Posterior


def keyed_sample(posterior: Posterior, seeds: Sequence[int]) -> Tensor:
    """Raw latents `[B, C, h, w]`, one draw of each posterior: the same for a seed in every stage."""
    if posterior.logvar is None:
        return posterior.mean
    return posterior.sample(normal(seeds, posterior.mean.shape[1:], "posterior"))


def with_seeds_on_host(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its seeds as a list: numbers are drawn on the host, and asking the device would make it wait."""
    return {**batch, "seeds": torch.as_tensor(batch["seeds"]).tolist()}
