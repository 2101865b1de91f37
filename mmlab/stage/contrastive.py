"""A small vision encoder from scratch, for work on a CPU. Legend: B pairs, E joint width."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.batch import PairBatch
from mmlab.data.collate import PairCollate
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.sample_types import ImageSpec
from mmlab.model.dual_encoder import DualEncoder
from mmlab.stage.stage import Stage


class ContrastivePretraining(Stage):
    """Images against captions with the pairwise sigmoid loss (SigLIP, section 3, algorithm 1).

    Each micro-batch of each rank is compared within itself. Images with equal captions match each other's captions:
    short captions repeat, and a repeated caption is not a negative.
    """

    model: DualEncoder

    def collate(self, data: ImageTextDataConfig) -> PairCollate:
        """Return the collate function.

        Raises:
            ConfigError: packing, which pairs do not have.
        """
        if data.pack:
            raise ConfigError("stage=contrastive compares whole images and captions; data.pack=true does not apply.")
        text = self.model.text
        image = ImageSpec(self.model.vision.image_size, data.aspect, reduce_jpegs=data.reduce_jpegs)
        return PairCollate(
            data, text.tokenizer, image, vocabulary=text.vocabulary, class_prompt=self.config.class_prompt
        )

    def similarities(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return (logits `[B, B]` of image i against text j, bool `[B, B]` whether they match)."""
        ids = batch["input_ids"]
        image, text = self.model(batch["pixel_values"], ids, batch["attention_mask"])
        return self.model.similarity(image, text), (ids[:, None] == ids[None]).all(-1)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        logits, match = self.similarities(batch)
        loss = -F.logsigmoid(torch.where(match, logits, -logits)).sum() / len(logits)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(logits))
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Log how often an image's most similar caption of the batch is its own (or an equal one)."""
        logits, match = self.similarities(batch)
        best = match.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        self.log("val/retrieval", best, prog_bar=True, batch_size=len(logits), sync_dist=True)
