"""A first stage learns to encode images and to decode them. Legend: B images, H/W pixels, C/h/w latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.data.config import ImageDataConfig
from mmlab.data.image_collate import ImageCollate
from mmlab.data.image_condition import Conditioning
from mmlab.model.autoencoder import AutoencoderModel
from mmlab.model.fidelity import psnr, ssim
from mmlab.model.first_stage import Posterior, Reconstruction, to_signed
from mmlab.model.perceptual import StandIn
from mmlab.model.quantizer import usage
from mmlab.stage.autoencoder_loss import (
    Terms,
    adaptive_weight,
    autoencoder_loss,
    generator_loss,
    hinge_loss,
    refuse_blow_up,
    refuse_code_collapse,
)
from mmlab.stage.config import AutoencoderTrainingConfig
from mmlab.stage.latents import STATISTICS_PICTURES, LatentMoments, keyed_sample, measure_latents, with_seeds_on_host
from mmlab.stage.means import Means
from mmlab.stage.stage import Stage
from mmlab.training.optim import AdamW
from mmlab.training.sharding import leaf_of

LEARNS = ("first_stage", "discriminator")


class AutoencoderTraining(Stage):
    """The adversarial autoencoder of VQGAN (arXiv 2012.09841, section 3.1) and latent diffusion (arXiv 2112.10752,
    appendix G): pixel and perceptual distance, a KL or codebook term, and a patch discriminator with hinge loss.

    One forward and one backward per micro-batch serve both: the autoencoder's adversarial term treats the discriminator
    as fixed, the discriminator's own term the reconstructions. So one optimizer steps both, and accumulation, clipping
    and checkpoints are those of every other stage. Before `adversarial_start` the discriminator is not run, and its
    weights are not changed.

    When training has ended, mean and standard deviation of the latents are measured, over validation images if there
    are any, and stored in the first stage's artifact.

    Args:
        config: settings.
        model: first stage, discriminator and perceptual distance.
        optim: builds optimizer and schedule.

    Raises:
        ConfigError: other parts to train.
    """

    model: AutoencoderModel

    def __init__(self, config: AutoencoderTrainingConfig, model: AutoencoderModel, optim: AdamW):
        super().__init__(config, model, optim)
        learns = LEARNS if model.discriminator is not None else LEARNS[:1]
        if set(config.trainable) != set(learns):
            raise ConfigError(
                f"stage=autoencoder trains {' and '.join(learns)}, so stage.trainable must be [{', '.join(learns)}]; "
                "stage.adversarial_weight=0 leaves the discriminator out."
            )
        if config.adversarial_weight and model.discriminator is None:
            raise ConfigError(
                f"stage.adversarial_weight={config.adversarial_weight:g} needs a discriminator; set it to 0, or choose"
                " model/discriminator=patch."
            )
        self.train_means, self.val_means = Means(), Means()
        self.val_latents, self.val_codes = LatentMoments(), torch.zeros(0)

    def on_filled(self, artifacts: Mapping[str, Path]) -> None:
        # Further training changes the latents.
        self.model.first_stage.forget_statistics()

    def collate(self, data: ImageDataConfig) -> ImageCollate:
        """Return the collate function.

        Raises:
            ConfigError: cached latents, or images of a size that the parts cannot take.
        """
        size = data.size
        if data.latents:
            raise ConfigError("stage=autoencoder learns from images; data.latents=true does not apply.")
        self.model.first_stage.side(size)
        data.check_step(self.model.first_stage.factor)
        size = min((size, *(min(shape) for shape in data.shapes)))
        discriminator: Any = self.model.discriminator
        smallest = 0 if discriminator is None else discriminator.smallest
        if self.config.adversarial_weight and size < smallest:
            raise ConfigError(
                f"data.size={size} is less than the discriminator's {smallest}; give model.discriminator fewer layers."
            )
        perceptual: Any = self.model.perceptual
        if size < perceptual.smallest:
            least, name = perceptual.smallest, type(perceptual).__name__
            small = StandIn.smallest
            otherwise = f", or model/perceptual=stand_in, which takes {small}" if size >= small else ""
            raise ConfigError(f"data.size={size} is less than {name}'s {least}; set data.size={least}{otherwise}.")
        return ImageCollate(data, Conditioning())

    @property
    def waiting(self) -> bool:
        """Whether the discriminator is not run at this step."""
        return not self.config.adversarial_weight or self.trainer.global_step < self.config.adversarial_start

    def batch_shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        return *super().batch_shape(batch), int(self.waiting)

    def on_before_batch_transfer(self, batch: Mapping[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return with_seeds_on_host(batch)

    def latents(self, x_B3HW: Tensor, seeds: Sequence[int]) -> tuple[Posterior, Tensor]:
        """Return (posterior, a draw of it keyed by the seeds) of images in [-1, 1]."""
        posterior = self.model.first_stage.encode(x_B3HW)
        return posterior, keyed_sample(posterior, seeds)

    def reconstruct(self, x_B3HW: Tensor, seeds: Sequence[int]) -> tuple[Reconstruction, Tensor, Terms]:
        """Return (reconstruction, raw latents, terms of the loss) of images in [-1, 1]."""
        posterior, z = self.latents(x_B3HW, seeds)
        made = self.model.first_stage.reconstruct(z)
        # Without a weight it is only logged; its backward pass takes a third of a small model's step.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.perceptual_weight > 0):
            perceptual_B = self.model.perceptual(made.pixels, x_B3HW)
        return made, z, autoencoder_loss(self.config, x_B3HW, made, posterior, perceptual_B)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        x = to_signed(batch["pixel_values"])
        made, _, terms = self.reconstruct(x, batch["seeds"])
        loss = terms.reconstruction + terms.penalty
        logged = {"loss": loss, **terms.logged}
        discriminator: Any = self.model.discriminator
        if self.waiting:
            loss = loss if discriminator is None else loss + self.without(discriminator)
        else:
            real, fake = discriminator(x), discriminator(made.pixels.detach())
            hinge = hinge_loss(real, fake)
            generator = generator_loss(discriminator, made.pixels)
            first_stage = self.model.first_stage
            last_layer = leaf_of(first_stage, first_stage.last_layer)
            weight = adaptive_weight(terms.reconstruction, generator, last_layer)
            loss = loss + self.config.adversarial_weight * weight * generator + hinge
            logged |= {"adaptive_weight": weight, "discriminator": hinge}
            logged |= {"logits_real": real.float().mean(), "logits_fake": fake.float().mean()}
        self.train_means.add_means(logged, len(x))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's means; `train/loss` is without the adversarial term, so it is comparable before and after."""
        means, _ = self.train_means.finish(self.trainer.world_size)
        values = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        refuse_blow_up(values, self.trainer.global_step + 1)
        if self.waiting and self.model.discriminator is not None:
            for parameter in self.model.discriminator.parameters():
                parameter.grad = None
        self.log("train/loss", values.pop("loss"), prog_bar=True, batch_size=1)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)
        super().on_before_optimizer_step(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Lightning counts the step after this has returned.
        self.model.first_stage.after_step(self.trainer.global_step + 1)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        x = to_signed(batch["pixel_values"])
        made, z, terms = self.reconstruct(x, batch["seeds"])
        pixels = made.pixels.clamp(-1, 1)
        logged = {name: value for name, value in terms.logged.items() if name != "pixel"}
        rec_loss = terms.logged["pixel"] + self.config.perceptual_weight * terms.logged["perceptual"]
        fidelity = {"psnr": psnr(pixels, x).mean(), "ssim": ssim(pixels, x).mean()}
        self.val_means.add_means({"rec_loss": rec_loss, **fidelity, **logged}, len(x))
        self.val_latents.add(z)
        if made.codes is not None:
            counts = made.codes.indices.flatten().bincount(minlength=made.codes.codes)
            self.val_codes = counts + self.val_codes if len(self.val_codes) else counts

    def on_validation_epoch_end(self) -> None:
        """Log means over all validation images: `rec_loss` is per value, whatever the reduction."""
        world = self.trainer.world_size
        values: dict[str, Any] = self.val_means.finish(world)[0]
        latents = self.val_latents.finish(world, self.device)
        values["latent_mean"] = latents.mean.abs().mean().item()
        values["latent_std"] = latents.std.mean().item()
        values["latent_kurtosis"] = latents.kurtosis.mean().item()
        if len(self.val_codes):
            counts, self.val_codes = self.val_codes, torch.zeros(0)
            if world > 1:
                torch.distributed.all_reduce(counts)
            values["code_use"], values["perplexity"] = usage(counts)
            refuse_code_collapse(values["perplexity"], len(counts), int(counts.sum()), self.trainer.global_step)
        self.log("val/psnr", values.pop("psnr"), prog_bar=True, batch_size=1)
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=1)

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            print(f"perceptual distance: {self.model.perceptual.label}")

    def on_fit_end(self) -> None:
        """Measure the latents of the final weights, also in a run that was killed just before and resumed."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batches, device = data.spread(STATISTICS_PICTURES), self.trainer.strategy.root_device
        measure_latents(self.model.first_stage, batches, self.trainer.world_size, device)
