"""A first stage learns to encode pictures and to decode them. Legend: B pictures, H/W pixels, C/h/w latents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.data.image_collate import ImageCollate
from mmlab.model.autoencoder import AutoencoderModel
from mmlab.model.fidelity import psnr, ssim
from mmlab.model.first_stage import Posterior, Reconstruction, to_signed
from mmlab.model.perceptual import StandIn
from mmlab.model.quantizer import usage
from mmlab.stage.autoencoder_loss import (
    AutoencoderLoss,
    Terms,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    refuse_blow_up,
    refuse_code_collapse,
)
from mmlab.stage.latents import LatentMoments, keyed_sample, with_seeds_on_host
from mmlab.stage.means import Means
from mmlab.stage.stage import Stage
from mmlab.training.artifacts import fill_parts
from mmlab.training.optim import AdamW, log_optimizer

LEARNS = ("first_stage", "discriminator")
STATISTICS_PICTURES = 4096
"""Pictures that the latents' statistics are measured on: a channel's mean is then known to 2 % of its deviation."""


class AutoencoderTraining(Stage):
    """The adversarial autoencoder of VQGAN (arXiv 2012.09841, section 3.1) and latent diffusion (arXiv 2112.10752,
    appendix G): pixel and perceptual distance, a KL or codebook term, and a patch discriminator with hinge loss.

    One forward and one backward per micro-batch serve both: the autoencoder's adversarial term sees the discriminator
    as fixed, the discriminator's own term the reconstructions. So one optimizer steps everything at once, and
    accumulation, clipping and checkpoints are those of every other stage. Before `adversarial_start` the discriminator
    is not run, and not touched by the optimizer.

    When training has ended, mean and standard deviation of the latents are measured, over validation pictures where
    there are any, and go into the first stage's artifact.

    Args:
        model: first stage, discriminator and perceptual distance.
        optim: builds optimizer and schedule.
        trainable: `[first_stage, discriminator]`.
        init_from: run folders whose artifacts fill the parts first.
        reduction, pixel, perceptual_weight, kl_weight, codebook_weight: see `AutoencoderLoss`.
        adversarial_weight: of the discriminator's verdict, times the adaptive weight; 0 never runs it.
        adversarial_start: optimizer steps before it runs.

    Raises:
        ConfigError: other parts to train, or artifacts that do not fit.
    """

    model: AutoencoderModel

    def __init__(
        self,
        model: AutoencoderModel,
        optim: AdamW,
        trainable: Sequence[str],
        init_from: Sequence[str] = (),
        reduction: str = "sum",
        pixel: str = "l1",
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        codebook_weight: float = 1.0,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 50001,
    ):
        super().__init__(model, optim, trainable)
        self.loss = AutoencoderLoss(reduction, pixel, perceptual_weight, kl_weight, codebook_weight)
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        if set(trainable) != set(LEARNS):
            raise ConfigError(
                f"stage=autoencoder trains {' and '.join(LEARNS)}, so stage.trainable must be [{', '.join(LEARNS)}]; "
                "stage.adversarial_weight=0 leaves the discriminator as it is."
            )
        fill_parts(model, [Path(run) for run in init_from])
        # Weights that go on learning make other latents.
        model.first_stage.forget_statistics()
        self.train_means, self.val_means = Means(), Means()
        self.val_latents, self.val_codes = LatentMoments(), torch.zeros(0)

    def collate(self, size: int, aspect: str, flip: bool, latents: bool) -> ImageCollate:
        """What turns samples into this stage's batches; arguments as in the data config.

        Raises:
            ConfigError: cached latents, or pictures of a size that the parts cannot take.
        """
        if latents:
            raise ConfigError("stage=autoencoder learns from pictures; data.latents=true does not apply.")
        self.model.first_stage.side(size)
        smallest = self.model.discriminator.smallest
        if self.adversarial_weight and size < smallest:
            raise ConfigError(
                f"data.size={size} is less than the discriminator's {smallest}; give model.discriminator fewer layers."
            )
        perceptual: Any = self.model.perceptual
        if size < perceptual.smallest:
            least, name = perceptual.smallest, type(perceptual).__name__
            small = StandIn.smallest
            otherwise = f", or model/perceptual=stand_in, which takes {small}" if size >= small else ""
            raise ConfigError(f"data.size={size} is less than {name}'s {least}; set data.size={least}{otherwise}.")
        return ImageCollate(size=size, aspect=aspect, flip=flip)

    @property
    def waiting(self) -> bool:
        """Whether the discriminator stands aside."""
        return not self.adversarial_weight or self.trainer.global_step < self.adversarial_start

    def on_before_batch_transfer(self, batch: Mapping[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return with_seeds_on_host(batch)

    def latents(self, x_B3HW: Tensor, seeds: Sequence[int]) -> tuple[Posterior, Tensor]:
        """Return (posterior, a draw of it keyed by the seeds) of pictures in [-1, 1]."""
        posterior = self.model.first_stage.encode(x_B3HW)
        return posterior, keyed_sample(posterior, seeds)

    def reconstruct(self, x_B3HW: Tensor, seeds: Sequence[int]) -> tuple[Reconstruction, Tensor, Terms]:
        """Return (reconstruction, raw latents, terms of the loss) of pictures in [-1, 1]."""
        posterior, z = self.latents(x_B3HW, seeds)
        made = self.model.first_stage.reconstruct(z)
        return made, z, self.loss(x_B3HW, made, posterior, self.model.perceptual(made.pixels, x_B3HW))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        x = to_signed(batch["pixel_values"])
        made, _, terms = self.reconstruct(x, batch["seeds"])
        loss = terms.reconstruction + terms.penalty
        shown = {"loss": loss, **terms.shown}
        if self.waiting:
            if self.trainer.world_size > 1:
                # DDP waits for a gradient of every weight; the optimizer will not see these zeros.
                loss = loss + 0 * torch.stack([p.sum() for p in self.model.discriminator.parameters()]).sum()
        else:
            generator = generator_loss(self.model.discriminator, made.pixels)
            weight = adaptive_weight(terms.reconstruction, generator, self.model.first_stage.last_layer)
            real, fake = self.model.discriminator(x), self.model.discriminator(made.pixels.detach())
            verdict = hinge_loss(real, fake)
            loss = loss + self.adversarial_weight * weight * generator + verdict
            shown |= {"adaptive_weight": weight, "discriminator": verdict}
            shown |= {"logits_real": real.float().mean(), "logits_fake": fake.float().mean()}
        self.train_means.add(shown, len(x))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's means; `train/loss` is without the adversarial term, so that it compares before and after."""
        values = self.train_means.finish(self.trainer.world_size)
        refuse_blow_up(values, self.trainer.global_step + 1)
        if self.waiting:
            for parameter in self.model.discriminator.parameters():
                parameter.grad = None
        self.log("train/loss", values.pop("loss"), prog_bar=True, batch_size=1)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)
        log_optimizer(self, optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Lightning counts a step once this has returned.
        self.model.first_stage.after_step(self.trainer.global_step + 1)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        x = to_signed(batch["pixel_values"])
        made, z, terms = self.reconstruct(x, batch["seeds"])
        pixels = made.pixels.clamp(-1, 1)
        shown = {name: value for name, value in terms.shown.items() if name != "pixel"}
        rec_loss = terms.shown["pixel"] + self.loss.perceptual_weight * terms.shown["perceptual"]
        fidelity = {"psnr": psnr(pixels, x).mean(), "ssim": ssim(pixels, x).mean()}
        self.val_means.add({"rec_loss": rec_loss, **fidelity, **shown}, len(x))
        self.val_latents.add(z)
        if made.codes is not None:
            counts = made.codes.indices.flatten().bincount(minlength=made.codes.codes)
            self.val_codes = counts + self.val_codes if len(self.val_codes) else counts

    def on_validation_epoch_end(self) -> None:
        """Log means over all validation pictures: `rec_loss` is per value, whatever the reduction."""
        world = self.trainer.world_size
        values = self.val_means.finish(world)
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

    @torch.no_grad()
    def on_fit_end(self) -> None:
        """Measure the latents of the final weights; also where a run was killed just before, and goes on to this."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        device, first_stage = self.trainer.strategy.root_device, self.model.first_stage
        first_stage.to(device).eval()
        moments = LatentMoments()
        for batch in data.spread(STATISTICS_PICTURES):
            x = to_signed(batch["pixel_values"].to(device))
            moments.add(self.latents(x, batch["seeds"].tolist())[1])
        found = moments.finish(self.trainer.world_size, device)
        first_stage.set_statistics(found.mean, found.std)
