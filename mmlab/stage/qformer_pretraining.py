"""A small Q-Former from scratch, for work on a CPU. Legend: B pairs, T text tokens, V vocabulary."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.batch import IGNORE, PairBatch
from mmlab.data.collate import PairCollate
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.sample_types import ImageSpec
from mmlab.model.image_text_qformer import ImageTextQFormer
from mmlab.stage.stage import Stage

SMOOTHING = 0.1  # of the contrastive and the caption loss (LAVIS, blip2_qformer.py and Qformer.py)


class QFormerPretraining(Stage):
    """Bootstrapping vision-language representation from a frozen image encoder (BLIP-2, section 3.2).

    The sum of three losses on the same pairs: images against the batch's texts (ITC), whether an image and a text are a
    pair, with negatives that ITC scores high (ITM), and the caption token by token (ITG). Each micro-batch of each rank
    is compared within itself; BLIP-2 gathers those of all ranks. Images with equal captions match each other's
    captions: short captions repeat, and a repeated caption is not a negative. Negatives are drawn from torch's own
    random numbers, not by sample: they depend on the number of devices.
    """

    model: ImageTextQFormer

    def collate(self, data: ImageTextDataConfig) -> PairCollate:
        """Return the collate function.

        Raises:
            ConfigError: packing, which pairs do not have, or texts longer than the Q-Former's.
        """
        if data.pack:
            raise ConfigError("stage=qformer_pretraining compares whole captions; data.pack=true does not apply.")
        longest, length = self.model.words.positions.num_embeddings, data.max_length
        if length > longest:
            raise ConfigError(f"data.max_length={length}, but the Q-Former's texts have at most {longest} tokens.")
        if length < 3:
            raise ConfigError(f"data.max_length={length} has no room for a word between the begin and end tokens.")
        image = ImageSpec(self.model.vision.image_size, data.aspect, reduce_jpegs=data.reduce_jpegs)
        prompt = self.config.class_prompt
        return PairCollate(data, self.model.tokenizer, image, self.model.frame, class_prompt=prompt)

    def losses(self, batch: PairBatch, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return ({itc, itm, itg}, how often an image's most similar caption of the batch is its own).

        Args:
            batch: pairs.
            generator: of the negatives; None draws from torch's own state, as dropout does.
        """
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        features = model.vision(batch["pixel_values"])
        same = (ids[:, None] == ids[None]).all(-1)
        similar = model.similarities(features, ids, mask)
        retrieval = same.gather(1, similar.argmax(1, keepdim=True)).float().mean()
        texts = images = torch.arange(0, device=ids.device)
        if not same.all():
            texts, images = (hard_negatives(s.detach(), same, generator) for s in (similar, similar.T))
        own = torch.arange(len(ids), device=ids.device)
        # Pairs; then each text with a wrong image; then each image with a wrong text.
        left, right = torch.cat([own, images, own[: len(texts)]]), torch.cat([own, own[: len(images)], texts])
        matches = (torch.arange(len(left), device=ids.device) < len(own)).long()
        words = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
        logits = model.captions(features, ids, mask)[:, :-1]
        losses = {
            "itc": contrastive_loss(similar, same),
            "itm": F.cross_entropy(model.matches(features[left], ids[right], mask[right]).float(), matches),
            "itg": F.cross_entropy(logits.flatten(0, 1).float(), words.flatten(), label_smoothing=SMOOTHING),
        }
        return losses, retrieval

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        losses, _ = self.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        size = len(batch["keys"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=size)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        # With its own generator: validation must not change what training draws.
        losses, retrieval = self.losses(batch, torch.Generator(batch["input_ids"].device).manual_seed(batch_idx))
        values = {**losses, "loss": torch.stack(list(losses.values())).sum(), "retrieval": retrieval}
        self.log_dict(
            {f"val/{name}": value for name, value in values.items()}, batch_size=len(batch["keys"]), sync_dist=True
        )


def contrastive_loss(similar_BB: Tensor, same_BB: Tensor) -> Tensor:
    """Cross-entropy over the batch, of texts for each image and of images for each text.

    Args:
        similar_BB: logits of image i against text j.
        same_BB: bool, whether captions i and j are equal; the target probability is shared evenly among equal ones.
    """
    targets = same_BB / same_BB.sum(1, keepdim=True)
    sides = [F.cross_entropy(logits, targets, label_smoothing=SMOOTHING) for logits in (similar_BB, similar_BB.T)]
    return torch.stack(sides).mean()


def hard_negatives(similar_BB: Tensor, same_BB: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each row a column that is not the same, drawn with its softmax probability: int64 `[B]`.

    Args:
        similar_BB: logits.
        same_BB: bool; at least one column of each row is false.
        generator: None draws from torch's own state.
    """
    # Never 0: a column with a tiny probability can be the only one that is not the same.
    weights = (similar_BB.softmax(1) + 1e-4).masked_fill(same_BB, 0)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
