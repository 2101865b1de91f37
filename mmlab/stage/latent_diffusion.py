"""A denoiser learns to undo noise, in pixels or in a first stage's latents. Legend: B pictures, C/h/w of latents."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.data.image_collate import ImageCollate, LatentCollate, form
from mmlab.diffusion.config import SamplerConfig
from mmlab.diffusion.process import NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.keyed import uniform
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.first_stage import Posterior, to_signed
from mmlab.stage.generative import GenerativeStage
from mmlab.stage.latents import keyed_sample
from mmlab.training.optim import AdamW
from mmlab.weights import fingerprint


class LatentDiffusion(GenerativeStage):
    """DDPM's simple loss (arXiv 2006.11239, equation 14) on a frozen first stage's latents (latent diffusion, arXiv
    2112.10752, equations 2 and 3); with the `Identity` first stage it is diffusion of pixels.

    Everything drawn is keyed by a sample's seed: the latent out of its posterior, its timestep, its noise, whether its
    condition is dropped. So ranks and micro-batches, cached latents and resumed runs learn from the same numbers.

    Args:
        model: first stage, conditioner and denoiser.
        optim: builds optimizer and schedule.
        trainable: names of the parts that learn; not the first stage.
        process: how latents become noise, and what the denoiser predicts.
        init_from: run folders whose artifacts fill the parts first.
        sampler: of the pictures that are shown; DDIM with 50 steps where it is None.
        loss: `l2`, or `l1` (latent diffusion's LSUN-Churches model).

    Raises:
        ConfigError: unknown parts, a first stage that would learn or whose latents were never measured, or artifacts
            that do not fit.
    """

    model: DiffusionModel
    learner = "denoiser"

    def __init__(
        self,
        model: DiffusionModel,
        optim: AdamW,
        trainable: Sequence[str],
        process: NoiseProcess,
        init_from: Sequence[str] = (),
        sampler: Sampler | None = None,
        loss: str = "l2",
    ):
        if loss not in ("l2", "l1"):
            raise ConfigError(f"stage.loss={loss} is none of l2, l1.")
        if loss == "l1" and getattr(process.config, "min_snr_gamma", None) is not None:
            raise ConfigError("process.min_snr_gamma weights squared errors; leave it out, or take stage.loss=l2.")
        super().__init__(model, optim, trainable, init_from)
        self.process = process
        self.sampler = sampler or Sampler(SamplerConfig())
        self.kind = loss
        if not model.first_stage.measured:
            raise ConfigError(
                "The latents of the first stage were never measured, so nothing brings them to unit variance: name the"
                " run that trained it in stage.init_from, or give model.first_stage a pretrained source."
            )

    def collate(self, size: int, aspect: str, flip: bool, latents: bool) -> ImageCollate | LatentCollate:
        """What turns samples into this stage's batches; arguments as in the data config.

        Raises:
            ConfigError: a size that the first stage cannot encode.
        """
        first_stage = self.model.first_stage
        side = first_stage.side(size)
        reduction = getattr(self.model.denoiser, "reduction", 1)
        if side % reduction:
            raise ConfigError(
                f"data.size={size} makes latents of {side} x {side}, which the denoiser cannot divide by {reduction}; "
                f"take a multiple of {first_stage.factor * reduction}."
            )
        if latents:
            shape = (first_stage.channels, side, side)
            return LatentCollate(fingerprint(first_stage), shape, form(size, aspect), flip, self.conditioning())
        return ImageCollate(size, aspect, flip, self.conditioning())

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Normalised latents of a batch, one draw of each posterior, float32 `[B, C, h, w]`.

        Args:
            batch: an `ImageBatch` or `LatentBatch`.
        """
        first_stage = self.model.first_stage
        if "mean" in batch:
            posterior = Posterior(batch["mean"], batch.get("logvar"))
        else:
            pixels = to_signed(batch["pixel_values"])
            # In full precision, as the statistics and the caches of latents are made.
            with torch.autocast(pixels.device.type, enabled=False):
                posterior = first_stage.encode(pixels)
        return first_stage.normalized(keyed_sample(posterior, batch["seeds"]))

    def loss(self, batch: Mapping[str, Any], dropout: float) -> Tensor:
        """Loss of each sample, float32 `[B]`.

        Args:
            batch: an `ImageBatch` or `LatentBatch`.
            dropout: probability that a sample's condition is replaced by the null one.
        """
        x_0 = self.latents(batch)
        t, noise = (drawn.to(x_0.device) for drawn in self.process.draw(batch["seeds"], x_0.shape[1:]))
        drop = (uniform(batch["seeds"], "drop condition") < dropout).to(x_0.device)
        condition = self.model.conditioner(batch, drop)
        x_t = self.process.add_noise(x_0, noise, t)
        prediction = self.model(x_t, self.process.model_time(t), condition)
        return self.process.loss(prediction, x_0, noise, t, self.kind)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.mean(self.loss(batch, self.model.conditioner.dropout))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss with every condition given; each validation draws the same noise for the same samples."""
        losses = self.loss(batch, dropout=0.0)
        self.log("val/loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)
