"""A transformer learns to write pictures as codes. Legend: B pictures, N codes of a picture, K codes of the book."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.cache_collate import CodeCollate
from mmlab.data.image_collate import ImageCollate, form
from mmlab.keyed import uniform
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.config import CodeSamplerConfig
from mmlab.stage.generative import GenerativeStage
from mmlab.training.optim import AdamW
from mmlab.weights import fingerprint


class CodePrior(GenerativeStage):
    """Next-code loss on the codes of a frozen VQ first stage (Taming Transformers, arXiv 2012.09841, equation 10).

    Everything drawn is keyed by a sample's seed: which codes are replaced, by which, and whether its condition is
    dropped. So ranks and micro-batches, cached codes and resumed runs learn from the same numbers.

    Args:
        model: first stage, conditioner, prior, and a first stage of maps where the conditioner reads them.
        optim: builds optimizer and schedule.
        trainable: names of the parts that learn; not the first stages.
        init_from: run folders whose artifacts fill the parts first.
        sampler: of the pictures that are shown; all codes at temperature 1 where it is None.
        pkeep: share of the codes that the transformer reads as they are; the others are replaced by random ones, so
            that it learns to go on after mistakes of its own. All of them are learned, whatever was read.

    Raises:
        ConfigError: unknown parts, a first stage that would learn or that nobody has trained, or artifacts that do not
            fit.
    """

    model: CodePriorModel
    learner = "prior"
    stays = ("first_stage", "map_stage")

    def __init__(
        self,
        model: CodePriorModel,
        optim: AdamW,
        trainable: Sequence[str],
        init_from: Sequence[str] = (),
        sampler: CodeSampler | None = None,
        pkeep: float = 1.0,
    ):
        if not 0 <= pkeep <= 1:
            raise ConfigError(f"stage.pkeep={pkeep:g} must lie in 0 … 1.")
        super().__init__(model, optim, trainable, init_from)
        self.sampler = sampler or CodeSampler(CodeSamplerConfig())
        self.pkeep = pkeep
        if model.first_stage.unlearnt:
            raise ConfigError(
                "Nobody has trained the first stage, so its codes say nothing: name the run that did in"
                " stage.init_from, or give model.first_stage.source."
            )
        if model.map_stage is not None and model.map_stage.unlearnt:
            raise ConfigError(
                "Nobody has trained the first stage of the maps; give"
                " model.map_stage.source=<run>/artifacts/first_stage."
            )

    def collate(self, size: int, aspect: str, flip: bool, latents: bool) -> ImageCollate | CodeCollate:
        """What turns samples into this stage's batches; arguments as in the data config.

        Raises:
            ConfigError: a size whose codes are not as many as the prior writes.
        """
        model = self.model
        side, learned = model.first_stage.side(size), model.prior.side
        if side != learned:
            raise ConfigError(
                f"data.size={size} makes {side} x {side} codes, and model.prior.side={learned}: set model.prior.side="
                f"{side}, or data.size={learned * model.first_stage.factor}."
            )
        if not latents:
            return ImageCollate(size, aspect, flip, self.conditioning(), maps=model.map_stage is not None)
        map_stage = None if model.map_stage is None else fingerprint(model.map_stage)
        return CodeCollate(
            fingerprint(model.first_stage), side, form(size, aspect), flip, self.conditioning(), map_stage
        )

    def codes(self, batch: Mapping[str, Any]) -> Tensor:
        """Codes of a batch in raster order, int64 `[B, N]`.

        Args:
            batch: an `ImageBatch` or `CodeBatch`.
        """
        found = batch["codes"] if "codes" in batch else self.model.codes(batch["pixel_values"])
        return found.flatten(1)

    def read(self, codes_BN: Tensor, seeds: Sequence[int], pkeep: float) -> Tensor:
        """The codes as the transformer reads them, int64 `[B, N]`: a share of 1 - pkeep is random.

        Args:
            codes_BN: of the pictures.
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
        return self.mean(self.loss(batch, self.model.conditioner.dropout, self.pkeep))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss with every condition given and every code read as it is."""
        losses = self.loss(batch, dropout=0.0, pkeep=1.0)
        self.log("val/loss", losses.mean(), prog_bar=True, batch_size=len(losses), sync_dist=True)
