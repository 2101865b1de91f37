"""Next-token training: what all language and vision-language stages share, and language pretraining itself."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.data.batch import ChatBatch
from mmlab.data.collate import ChatCollate
from mmlab.data.config import Prompt
from mmlab.data.sample import ImageSpec
from mmlab.stage.stage import Stage
from mmlab.stage.token_loss import TokenMean, rescale_gradients, summed_cross_entropy, supervised
from mmlab.training.artifacts import fill_parts
from mmlab.training.feature_cache import FeatureCache
from mmlab.training.optim import AdamW, log_optimizer
from mmlab.training.trainable import parts_of


class NextTokenStage(Stage):
    """Next-token training of some parts of a model, the others frozen.

    Args:
        model: its direct children are the parts.
        optim: builds optimizer and schedule.
        trainable: names of the parts that learn.
        prompt: the form in which samples become token sequences.
        init_from: run folders whose artifacts fill the parts first.
        feature_cache_mb: memory for the features of a frozen vision encoder (and Q-Former); 0 recomputes them.

    Raises:
        ConfigError: unknown parts, or artifacts that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: AdamW,
        trainable: Sequence[str],
        prompt: Prompt,
        init_from: Sequence[str] = (),
        feature_cache_mb: int = 0,
    ):
        super().__init__(model, optim, trainable)
        self.prompt = prompt
        self.refuse()
        fill_parts(model, [Path(run) for run in init_from])
        # What comes before the connector; a part of it that learns has other features at every step.
        reads = {"vision", "qformer"} & parts_of(model).keys()
        self.cache = FeatureCache(feature_cache_mb if reads and reads <= set(self.frozen) else 0)
        self.train_mean, self.val_mean = TokenMean(), TokenMean()

    def refuse(self) -> None:
        """Raise ConfigError for what the paper's stage does not do."""

    def collate(self, max_length: int, pack: bool, aspect: str, augment: bool) -> ChatCollate:
        """What turns samples into this stage's batches; arguments as in the data config.

        Raises:
            ConfigError: an option that this stage's batches do not have.
        """
        if augment:
            raise ConfigError(
                "data.augment=true changes pictures that questions are about; use it with stage=contrastive."
            )
        return ChatCollate(self.model.language.tokenizer, self.prompt, self.image(aspect), max_length, pack)

    def image(self, aspect: str) -> ImageSpec | None:
        """How pictures are read; None leaves them unread."""
        return None

    def logits(self, batch: ChatBatch, keep: Tensor) -> Tensor:
        """Logits `[S, V]` at the bool places `keep` `[B, T]`."""
        raise NotImplementedError

    def on_before_batch_transfer(self, batch: ChatBatch, dataloader_idx: int) -> ChatBatch:
        # Looked at on the host: asking the device would make it wait at every step.
        return {**batch, "packed": bool((batch["segment_ids"] > 1).any())}

    def loss(self, batch: ChatBatch) -> tuple[Tensor, int]:
        """Return (cross-entropy summed over the supervised tokens, their number)."""
        keep, targets = supervised(batch["labels"], batch["segment_ids"])
        return summed_cross_entropy(self.logits(batch, keep), targets), len(targets)

    def training_step(self, batch: ChatBatch, batch_idx: int) -> Tensor:
        loss, tokens = self.loss(batch)
        self.train_mean.add(loss, tokens)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        mean, tokens = self.train_mean.finish(self.trainer.world_size)
        # DDP has averaged the gradients over ranks, and Lightning has divided each loss by the number of
        # micro-batches: both are undone here.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        rescale_gradients(self.model.parameters(), scale / tokens.clamp(min=1))
        self.log_dict({"train/loss": mean, "train/tokens": tokens}, prog_bar=True)
        log_optimizer(self, optimizer)

    def validation_step(self, batch: ChatBatch, batch_idx: int) -> None:
        self.val_mean.add(*self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        mean, _ = self.val_mean.finish(self.trainer.world_size)
        self.log("val/loss", mean, prog_bar=True)

    def on_fit_start(self) -> None:
        if "bf16" in str(self.trainer.precision):
            parts = dict(self.model.named_children())
            for name in self.frozen:
                parts[name].to(torch.bfloat16)


class LanguagePretraining(NextTokenStage):
    """Next-token prediction on text alone (part: language).

    With `prompt.pictures: text` a picture's caption stands in its place, so that the language model learns
    to talk about descriptions before it ever sees a picture's features.
    """

    def logits(self, batch: ChatBatch, keep: Tensor) -> Tensor:
        language = self.model.language
        embeds = language.embed(batch["input_ids"])
        return language(
            embeds, keep, batch["segment_ids"], batch["context_ids"], batch["position_ids"], batch["packed"]
        )
