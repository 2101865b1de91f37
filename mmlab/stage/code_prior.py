"""A transformer learns to write images as codes. Legend: B images, N codes of an image, K codes of the book."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.cache_collate import CodeCollate
from mmlab.data.config import ImageDataConfig
from mmlab.data.image_collate import ImageCollate
from mmlab.keyed import uniform
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.config import CodeSamplerConfig
from mmlab.stage.config import CodePriorConfig
from mmlab.stage.generative import GenerativeStage
from mmlab.training.optim import AdamW
from mmlab.weights import content_hash


class CodePrior(GenerativeStage):
    """Next-code loss on the codes of a frozen VQ first stage (Taming Transformers, arXiv 2012.09841, equation 10).

    All random numbers are keyed by a sample's seed: which codes are replaced, by which, and whether its condition is
    dropped. They are the same for any ranks and micro-batches, for cached codes, and after a resume.

    Args:
        config: settings.
        model: first stage, conditioner, prior, and a first stage of maps if the conditioner reads them.
        optim: builds optimizer and schedule.
        sampler: of the run's samples; all codes at temperature 1 where it is None.

    Raises:
        ConfigError: unknown parts, or a first stage to train.
    """

    model: CodePriorModel
    learner = "prior"
    stays = ("first_stage", "map_stage")

    def __init__(
        self, config: CodePriorConfig, model: CodePriorModel, optim: AdamW, sampler: CodeSampler | None = None
    ):
        super().__init__(config, model, optim)
        self.sampler = sampler or CodeSampler(CodeSamplerConfig())

    def on_filled(self, artifacts: Mapping[str, Path]) -> None:
        super().on_filled(artifacts)
        if self.model.first_stage.untrained:
            raise ConfigError(
                "The first stage is untrained, so its codes are meaningless: name the run that trained it in"
                " stage.init_from, or set model.first_stage.source."
            )
        if self.model.map_stage is not None and self.model.map_stage.untrained:
            raise ConfigError(
                "The first stage of the maps is untrained; set model.map_stage.source=<run>/artifacts/first_stage."
            )

    def collate(self, data: ImageDataConfig) -> ImageCollate | CodeCollate:
        """Return the collate function.

        Raises:
            ConfigError: a size with another number of codes than the prior has.
        """
        if data.shapes:
            raise ConfigError("stage=code_prior learns images of one shape; set data.buckets.max_aspect=null.")
        model = self.model
        side, trained = model.first_stage.side(data.size), model.prior.side
        if side != trained:
            raise ConfigError(
                f"data.size={data.size} makes {side} x {side} codes, and model.prior.side={trained}: set"
                f" model.prior.side={side}, or data.size={trained * model.first_stage.factor}."
            )
        if not data.latents:
            return ImageCollate(data, self.conditioning(), maps=model.map_stage is not None)
        map_stage = None if model.map_stage is None else content_hash(model.map_stage)
        return CodeCollate(data, content_hash(model.first_stage), side, self.conditioning(), map_stage)

    def codes(self, batch: Mapping[str, Any]) -> Tensor:
        """Codes of a batch in raster order, int64 `[B, N]`.

        Args:
            batch: an `ImageBatch` or `CodeBatch`.
        """
        codes = batch["codes"] if "codes" in batch else self.model.codes(batch["pixel_values"])
        return codes.flatten(1)

    def read(self, codes_BN: Tensor, seeds: Sequence[int], pkeep: float) -> Tensor:
        """The codes that the transformer reads, int64 `[B, N]`: a share of 1 - pkeep is random.

        Args:
            codes_BN: of the images.
            seeds: of the samples.
            pkeep: probability that a code stays.
        """
        if pkeep == 1:
            return codes_BN
        shape, book = codes_BN.shape[1:], self.model.first_stage.quantizer.codes
        keep = uniform(seeds, "keep code", shape) < pkeep
        other = (uniform(seeds, "other code", shape) * book).long()
        return torch.where(keep.to(codes_BN.device), codes_BN, other.to(codes_BN.device))

    def loss(self, batch: Mapping[str, Any], dropout: float, pkeep: float) -> Tensor:
        """Cross-entropy of each sample, nats per code, float32 `[B]`.

        Args:
            batch: an `ImageBatch` or `CodeBatch`.
            dropout: probability that a sample's condition is replaced by the null one.
            pkeep: see `read`.
        """
        codes_BN = self.codes(batch)
        drop = (uniform(batch["seeds"], "drop condition") < dropout).to(codes_BN.device)
        condition = self.model.condition(batch, drop)
        logits = self.model(self.read(codes_BN, batch["seeds"], pkeep), condition)
        return F.cross_entropy(logits.float().transpose(1, 2), codes_BN, reduction="none").mean(1)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.mean(self.loss(batch, self.model.conditioner.dropout, self.config.pkeep))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss with all conditions and no random codes."""
        losses = self.loss(batch, dropout=0.0, pkeep=1.0)
        self.log("val/loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)
