"""A small vision encoder from scratch, for work on a CPU. Legend: B pairs, E joint width."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.batch import PairBatch
from mmlab.data.collate import PairCollate
from mmlab.data.sample import ImageSpec
from mmlab.model.dual_encoder import DualEncoder
from mmlab.stage.stage import Stage
from mmlab.training.artifacts import fill_parts
from mmlab.training.optim import AdamW, log_optimizer


class ContrastivePretraining(Stage):
    """Pictures against captions with the pairwise sigmoid loss (SigLIP, section 3, algorithm 1).

    Each micro-batch of each rank is compared within itself. Pictures whose captions are equal match each
    other's captions: short captions repeat, and a repeated caption is no negative.

    Args:
        model: two towers; parts vision, text and their heads.
        optim: builds optimizer and schedule.
        trainable: names of the parts that learn.
        init_from: run folders whose artifacts fill the parts first.
    """

    model: DualEncoder

    def __init__(
        self,
        model: DualEncoder,
        optim: AdamW,
        trainable: Sequence[str],
        init_from: Sequence[str] = (),
    ):
        super().__init__(model, optim, trainable)
        fill_parts(model, [Path(run) for run in init_from])

    def collate(self, max_length: int, pack: bool, aspect: str, augment: bool) -> PairCollate:
        """What turns samples into this stage's batches; arguments as in the data config.

        Raises:
            ConfigError: packing, which pairs do not have.
        """
        if pack:
            raise ConfigError("stage=contrastive compares whole pictures and captions; data.pack=true does not apply.")
        image = ImageSpec(self.model.vision.image_size, aspect)
        return PairCollate(self.model.text.tokenizer, image, max_length=max_length, augment=augment)

    def similarities(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return (logits `[B, B]` of picture i against text j, bool `[B, B]` whether they match)."""
        ids = batch["input_ids"]
        picture, text = self.model(batch["pixel_values"], ids, batch["attention_mask"])
        return self.model.similarity(picture, text), (ids[:, None] == ids[None]).all(-1)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        logits, match = self.similarities(batch)
        loss = -F.logsigmoid(torch.where(match, logits, -logits)).sum() / len(logits)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(logits))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        log_optimizer(self, optimizer)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Log how often a picture's most similar caption of the batch is its own (or an equal one)."""
        logits, match = self.similarities(batch)
        best = match.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        self.log("val/retrieval", best, prog_bar=True, batch_size=len(logits), sync_dist=True)
