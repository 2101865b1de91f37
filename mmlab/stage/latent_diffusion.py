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
from mmlab.model.alignment import features_of
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
        ConfigError: unknown parts, a first stage or a vision encoder to train, an alignment or uncertainty not to
            train, a loss that the process does not weight, weights that an uncertainty undoes, or another process than
            that of the pipeline from which the denoiser starts.

    With an alignment, the similarity of hidden tokens and a frozen vision encoder's features of the clean images is
    subtracted from the loss (REPA, arXiv 2410.06940), in training steps up to `alignment_stop`.

    With an uncertainty, training steps weight the loss of each noise level by it (EDM2, arXiv 2312.02696); validation
    does not.

    The statistics of latents that no earlier run has measured are measured from training images before the first step,
    unless the denoiser starts from a published model, which takes the latents as they are; checkpoints hold them, and
    the run's artifacts the first stage with them.
    """

    model: DiffusionModel
    learner = "denoiser"
    full_step = 0  # the alignment may stop

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
        if model.uncertainty is not None and getattr(process.config, "min_snr_gamma", None) is not None:
            raise ConfigError(
                "model.uncertainty divides the loss of each noise level by its mean, and so by the weight of"
                " process.min_snr_gamma, too, which would have no effect; leave out one of them."
            )
        super().__init__(config, model, optim)
        if model.alignment is not None and ("vision" not in self.frozen or "alignment" in self.frozen):
            raise ConfigError("stage.trainable must name alignment, and not vision, to which the denoiser is aligned.")
        if "uncertainty" in self.frozen:
            raise ConfigError("stage.trainable must name uncertainty, which is learned; or set model.uncertainty=null.")
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
        if "vision" in self.kept:
            raise ConfigError(
                "The vision encoder of model.alignment has random weights: name the run that trained it in"
                " stage.init_from, or set model.vision.source."
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
        data.check_step(first_stage.factor * reduction)
        if data.shapes and self.model.alignment is not None:
            raise ConfigError("model.alignment compares features of squares; set data.buckets.max_aspect=null.")
        if data.latents:
            if not first_stage.measured:
                raise ConfigError(
                    "The first stage's latent statistics are not known, and are measured from images: train with"
                    " data.latents=false, or name in stage.init_from the run that encoded the latents."
                )
            shape = (first_stage.channels, side, side)
            aligned = self.model.alignment is not None
            return LatentCollate(data, content_hash(first_stage), shape, self.conditioning(), images=aligned)
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

    @property
    def aligning(self) -> bool:
        """Whether hidden tokens are aligned at this step."""
        stop = self.config.alignment_stop
        return self.model.alignment is not None and (stop is None or self.trainer.global_step < stop)

    def batch_shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        return *super().batch_shape(batch), int(self.aligning)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        alignment: Any = self.model.alignment
        dropout = self.model.conditioner.dropout
        if not self.aligning:
            loss = self.weighted_mean(self.loss(batch, dropout), batch)
            return loss if alignment is None else loss + self.without(alignment)
        with alignment.hidden_of(self.model.denoiser) as hidden:
            losses = self.loss(batch, dropout)
        similarity = alignment(hidden[0], *self.features(batch["pixel_values"]))
        loss = self.weighted_mean(losses, batch, alignment=similarity)
        return loss - self.config.alignment_weight * similarity.mean()

    def weighted_mean(self, losses_B: Tensor, batch: Mapping[str, Any], **others_B: Tensor) -> Tensor:
        """Return the mean of a micro-batch's losses, weighted by their uncertainty if the model has one.

        Both are logged, `train/loss` without these weights, so that it is comparable.
        """
        uncertainty: Any = self.model.uncertainty
        if uncertainty is None:
            return self.mean(losses_B, **others_B)
        times = self.process.draw_times(batch["seeds"]).to(losses_B.device)
        weighted_B = uncertainty(losses_B, self.process.snr(times))
        self.mean(losses_B, weighted_loss=weighted_B, **others_B)
        return weighted_B.mean()

    def features(self, pixels_B3HW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return (the vision encoder's features of uint8 images, rows and columns of the denoiser's hidden tokens)."""
        denoiser: Any = self.model.denoiser
        per_token = self.model.first_stage.factor * denoiser.reduction  # pixels along a side
        height, width = pixels_B3HW.shape[-2:]
        return features_of(self.model.vision, pixels_B3HW), (height // per_token, width // per_token)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.model.alignment is not None and not self.aligning:
            for weight in self.model.alignment.parameters():
                weight.grad = None
            last: Any = self.trainer._results.get("on_before_optimizer_step.train/alignment")  # type: ignore[union-attr]
            if last is not None:
                last.reset()  # Lightning would log this value at every later step
        super().on_before_optimizer_step(optimizer)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss with all conditions; each validation draws the same noise for the same samples."""
        losses = self.loss(batch, dropout=0.0)
        self.log("val/loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)
