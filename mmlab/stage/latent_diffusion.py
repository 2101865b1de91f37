"""A denoiser learns to undo noise, in pixels or in a first stage's latents. Legend: B images, C/h/w of latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.data.cache_collate import LatentCollate
from mmlab.data.config import ImageDataConfig
from mmlab.data.image_collate import ImageCollate
from mmlab.diffusion.config import SamplerConfig
from mmlab.diffusion.process import Diffusion, NoiseProcess
from mmlab.diffusion.samplers import Sampler
from mmlab.diffusion.stated_process import check_process
from mmlab.keyed import uniform
from mmlab.model.denoiser import DiffusionModel
from mmlab.model.diffusers_source import scheduler_of
from mmlab.model.first_stage import STATISTICS, Posterior, to_signed
from mmlab.stage.config import LatentDiffusionConfig
from mmlab.stage.generative import GenerativeStage
from mmlab.stage.latents import STATISTICS_PICTURES, keyed_sample, measure_latents
from mmlab.training.optim import AdamW
from mmlab.weights import content_hash


class LatentDiffusion(GenerativeStage):
    """DDPM's simple loss (arXiv 2006.11239, equation 14) on a frozen first stage's latents (latent diffusion, arXiv
    2112.10752, equations 2 and 3); with the `Identity` first stage it is diffusion of pixels.

    All random numbers are keyed by a sample's seed: the draw from its posterior, its timestep, its noise, and whether
    its condition is dropped. They are the same for any ranks and micro-batches, for cached latents, and after a resume.

    Args:
        config: settings.
        model: first stage, conditioner and denoiser.
        optim: builds optimizer and schedule.
        process: how latents become noise, and what the denoiser predicts.
        sampler: of the run's samples; DDIM with 50 steps where it is None.

    Raises:
        ConfigError: unknown parts, a first stage to train, a loss that the process does not weight, or another process
            than that of the pipeline from which the denoiser starts.

    The statistics of latents that no earlier run has measured are measured from training images before the first step,
    unless the denoiser starts from a published model, which takes the latents as they are; checkpoints hold them, and
    the run's artifacts the first stage with them.
    """

    model: DiffusionModel
    learner = "denoiser"

    def __init__(
        self,
        config: LatentDiffusionConfig,
        model: DiffusionModel,
        optim: AdamW,
        process: NoiseProcess,
        sampler: Sampler | None = None,
    ):
        if config.loss == "l1" and isinstance(process, Diffusion) and process.config.min_snr_gamma is not None:
            raise ConfigError("process.min_snr_gamma weights squared errors; leave it out, or set stage.loss=l2.")
        super().__init__(config, model, optim)
        self.process = process
        self.sampler = sampler or Sampler(SamplerConfig())

    def on_filled(self, artifacts: Mapping[str, Path]) -> None:
        super().on_filled(artifacts)
        if "first_stage" in self.kept and not self.model.first_stage.measured:
            random = getattr(self.model.first_stage.settings, "init", "pretrained") == "random"
            raise ConfigError(
                "The first stage is untrained, so its latents are meaningless: name the run that trained it in"
                " stage.init_from, or set model.first_stage.source"
                f"{' with model.first_stage.init=pretrained' if random else ''}."
            )
        first_stage, settings = self.model.first_stage, getattr(self.model.denoiser, "settings", None)
        source = None if "denoiser" in artifacts else getattr(settings, "source", None)
        if not first_stage.measured:
            self.completed = ["first_stage"]
            if source is not None:  # the denoiser has learned the latents as they are
                first_stage.set_statistics(first_stage.latent_mean, first_stage.latent_std)
        if source is not None:
            check_process(self.process, scheduler_of(source), source)

    def collate(self, data: ImageDataConfig) -> ImageCollate | LatentCollate:
        """Return the collate function.

        Raises:
            ConfigError: a size that the first stage cannot encode, or whose latents the denoiser cannot process.
        """
        first_stage = self.model.first_stage
        side = first_stage.side(data.size)
        reduction = getattr(self.model.denoiser, "reduction", 1)
        if side % reduction:
            raise ConfigError(
                f"data.size={data.size} makes latents of {side} x {side}, which the denoiser cannot divide by"
                f" {reduction}; take a multiple of {first_stage.factor * reduction}."
            )
        if data.latents:
            if not first_stage.measured:
                raise ConfigError(
                    "The first stage's latent statistics are not known, and are measured from images: train with"
                    " data.latents=false, or name in stage.init_from the run that encoded the latents."
                )
            shape = (first_stage.channels, side, side)
            return LatentCollate(data, content_hash(first_stage), shape, self.conditioning())
        return ImageCollate(data, self.conditioning())

    def on_fit_start(self) -> None:
        """Measure latents whose statistics no earlier run has stored; a resumed run has its own."""
        if self.model.first_stage.measured:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batches, device = data.spread(STATISTICS_PICTURES, training=True), self.trainer.strategy.root_device
        measure_latents(self.model.first_stage, batches, self.trainer.world_size, device)
        if self.trainer.is_global_zero:
            first_stage = self.model.first_stage
            rows = zip(first_stage.latent_mean.tolist(), first_stage.latent_std.tolist(), strict=True)
            print(f"latent statistics, measured: {', '.join(f'{mean:.3g} ± {std:.3g}' for mean, std in rows)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        statistics = {f"model.first_stage.{name}" for name in STATISTICS if self.completed}
        measured = {name: value for name, value in checkpoint["state_dict"].items() if name in statistics}
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] |= measured

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Normalized latents of a batch, one draw of each posterior, float32 `[B, C, h, w]`.

        Args:
            batch: an `ImageBatch` or `LatentBatch`.
        """
        first_stage = self.model.first_stage
        if "mean" in batch:
            posterior = Posterior(batch["mean"], batch.get("logvar"))
        else:
            pixels = to_signed(batch["pixel_values"])
            # In full precision, like the statistics and the cached latents.
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
        return self.process.loss(prediction, x_0, noise, t, self.config.loss)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.mean(self.loss(batch, self.model.conditioner.dropout))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss with all conditions; each validation draws the same noise for the same samples."""
        losses = self.loss(batch, dropout=0.0)
        self.log("val/loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)
