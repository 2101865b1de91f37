"""A small Q-Former from scratch, for work on a CPU. Legend: B pairs, T text tokens, V vocabulary."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.batch import IGNORE, PairBatch
from mmlab.data.collate import PairCollate
from mmlab.data.sample import ImageSpec
from mmlab.model.image_text_qformer import ImageTextQFormer
from mmlab.stage.stage import Stage
from mmlab.training.artifacts import fill_parts
from mmlab.training.optim import AdamW, log_optimizer

SMOOTHING = 0.1  # of the contrastive and the caption loss (LAVIS, blip2_qformer.py and Qformer.py)


class QFormerPretraining(Stage):
    """Bootstrapping vision-language representation from a frozen image encoder (BLIP-2, section 3.2).

    The sum of three losses on the same pairs: pictures against texts of the batch (ITC), whether a picture and a
    text are a pair, among negatives that ITC takes for likely (ITM), and the caption word by word (ITG).
    Each micro-batch of each rank is compared within itself; BLIP-2 gathers those of all ranks. Pictures whose
    captions are equal match each other's captions: short captions repeat, and a repeated caption is no negative.
    Negatives are drawn from torch's own random numbers, not by sample: other numbers of devices draw others.

    Args:
        model: vision encoder, Q-Former and its heads.
        optim: builds optimizer and schedule.
        trainable: names of the parts that learn.
        init_from: run folders whose artifacts fill the parts first.

    Raises:
        ConfigError: unknown parts, or artifacts that do not fit.
    """

    model: ImageTextQFormer

    def __init__(
        self,
        model: ImageTextQFormer,
        optim: AdamW,
        trainable: Sequence[str],
        init_from: Sequence[str] = (),
    ):
        super().__init__(model, optim, trainable)
        fill_parts(model, [Path(run) for run in init_from])

    def collate(self, max_length: int, pack: bool, aspect: str, augment: bool) -> PairCollate:
        """What turns samples into this stage's batches; arguments as in the data config.

        Raises:
            ConfigError: packing, which pairs do not have, or texts longer than the Q-Former's.
        """
        if pack:
            raise ConfigError("stage=qformer_pretraining compares whole captions; data.pack=true does not apply.")
        longest = self.model.words.positions.num_embeddings
        if max_length > longest:
            raise ConfigError(f"data.max_length={max_length}, but the Q-Former's texts have at most {longest} tokens.")
        if max_length < 3:
            raise ConfigError(f"data.max_length={max_length} has no room for a word between a text's two marks.")
        image = ImageSpec(self.model.vision.image_size, aspect)
        return PairCollate(self.model.tokenizer, image, max_length, augment, self.model.frame)

    def losses(self, batch: PairBatch, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return ({itc, itm, itg}, how often a picture's most similar caption of the batch is its own).

        Args:
            batch: pairs.
            generator: draws the negatives; None draws from torch's own state, as dropout does.
        """
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        features = model.vision(batch["pixel_values"])
        same = (ids[:, None] == ids[None]).all(-1)
        similar = model.similarities(features, ids, mask)
        found = same.gather(1, similar.argmax(1, keepdim=True)).float().mean()
        texts = pictures = torch.arange(0, device=ids.device)
        if not same.all():
            texts, pictures = (hard_negatives(s.detach(), same, generator) for s in (similar, similar.T))
        own = torch.arange(len(ids), device=ids.device)
        # Pairs; then each text with a wrong picture; then each picture with a wrong text.
        shown, told = torch.cat([own, pictures, own[: len(texts)]]), torch.cat([own, own[: len(pictures)], texts])
        fits = (torch.arange(len(shown), device=ids.device) < len(own)).long()
        words = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
        logits = model.captions(features, ids, mask)[:, :-1]
        losses = {
            "itc": contrastive_loss(similar, same),
            "itm": F.cross_entropy(model.matches(features[shown], ids[told], mask[told]).float(), fits),
            "itg": F.cross_entropy(logits.flatten(0, 1).float(), words.flatten(), label_smoothing=SMOOTHING),
        }
        return losses, found

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        losses, _ = self.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        size = len(batch["keys"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=size)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        log_optimizer(self, optimizer)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        # Negatives of their own: how often one validates must not change what training draws.
        losses, found = self.losses(batch, torch.Generator(batch["input_ids"].device).manual_seed(batch_idx))
        values = {**losses, "loss": torch.stack(list(losses.values())).sum(), "retrieval": found}
        self.log_dict(
            {f"val/{name}": value for name, value in values.items()}, batch_size=len(batch["keys"]), sync_dist=True
        )


def contrastive_loss(similar_BB: Tensor, same_BB: Tensor) -> Tensor:
    """Cross-entropy over the batch, of texts for each picture and of pictures for each text.

    Args:
        similar_BB: logits of picture i against text j.
        same_BB: bool, whether captions i and j are equal; they share the probability evenly.
    """
    wanted = same_BB / same_BB.sum(1, keepdim=True)
    sides = [F.cross_entropy(logits, wanted, label_smoothing=SMOOTHING) for logits in (similar_BB, similar_BB.T)]
    return torch.stack(sides).mean()


def hard_negatives(similar_BB: Tensor, same_BB: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each row a column that is not the same, drawn in proportion to its softmax: int64 `[B]`.

    Args:
        similar_BB: logits.
        same_BB: bool; at least one column of each row is false.
        generator: draws; None draws from torch's own state.
    """
    # Never nothing: a column far from all others can still be the only one that is not the same.
    weights = (similar_BB.softmax(1) + 1e-4).masked_fill(same_BB, 0)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
