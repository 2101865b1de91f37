"""Next-token training: the base of all language and vision-language stages, and language pretraining."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from tqdm import tqdm

from mmlab.config.errors import ConfigError
from mmlab.data.batch import ChatBatch
from mmlab.data.collate import ChatCollate
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.sample_types import ImageSpec
from mmlab.model.row_blocks import Layout
from mmlab.stage.config import NextTokenStageConfig
from mmlab.stage.means import Means
from mmlab.stage.stage import Stage
from mmlab.stage.token_loss import rescale_gradients, supervised
from mmlab.training.feature_cache import FeatureCache
from mmlab.training.optim import AdamW
from mmlab.training.trainable import parts_of
from mmlab.weights import is_sharded


class NextTokenStage(Stage):
    """Next-token training of some parts of a model, the others frozen.

    Args:
        config: settings.
        model: its direct children are the parts.
        optim: builds optimizer and schedule.

    Raises:
        ConfigError: unknown parts, or settings that contradict the paper's stage.
    """

    def __init__(self, config: NextTokenStageConfig, model: nn.Module, optim: AdamW):
        super().__init__(config, model, optim)
        self.refuse()
        # Features before the connector change at every step if a part that makes them is trained.
        encoders = self._encoders()
        self.cache = FeatureCache(config.feature_cache_mb if encoders and encoders.keys() <= set(self.frozen) else 0)
        self._announced: set[str] = set()
        self.train_means, self.val_means = Means("loss"), Means("loss")

    def refuse(self) -> None:
        """Raise ConfigError for settings that contradict the paper's stage."""

    def _encoders(self) -> dict[str, nn.Module]:
        """The parts that make features of images."""
        return {name: part for name, part in parts_of(self.model).items() if name in ("vision", "qformer")}

    def configure_model(self) -> None:
        super().configure_model()
        if self.cache.budget and any(is_sharded(w) for part in self._encoders().values() for w in part.parameters()):
            # A rank that finds its images in the cache would not encode, and those that do wait for its weights.
            self.cache = FeatureCache(0)
            rank_zero_warn(
                "stage.feature_cache_mb is not used, because the encoder is sharded and all ranks encode together; a "
                "larger trainer.fsdp.whole_below keeps it whole."
            )

    def collate(self, data: ImageTextDataConfig) -> ChatCollate:
        """Return the collate function.

        Raises:
            ConfigError: an option that this stage's batches do not have.
        """
        if data.augment and self.config.feature_cache_mb:
            raise ConfigError("data.augment=true varies pictures each time, so set stage.feature_cache_mb=0.")
        language, prompt = self.model.language, self.config.prompt
        return ChatCollate(data, prompt, language.tokenizer, self.image(data), language.vocabulary)

    def image(self, data: ImageTextDataConfig) -> ImageSpec | None:
        """How images are decoded; None does not read them."""
        return None

    def cross_entropy(self, batch: ChatBatch, keep: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed over the positions `keep`, bool `[B, T]`, with their `targets`, int64 `[S]`."""
        raise NotImplementedError

    def on_before_batch_transfer(self, batch: ChatBatch, dataloader_idx: int) -> ChatBatch:
        # On the host: reading it from the device would synchronize at every step.
        packed: bool | Layout = bool((batch["segment_ids"] > 1).any())
        if packed and self.device.type == "cuda":
            packed = Layout(batch["segment_ids"], batch["context_ids"])
        return {**batch, "packed": packed}

    def batch_shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        rows, length = batch["input_ids"].shape
        return rows * length, length, len(self.cache.missing(batch["image_keys"]))

    def loss(self, batch: ChatBatch) -> tuple[Tensor, int]:
        """Return (cross-entropy summed over the supervised tokens, their number)."""
        keep, targets = supervised(batch["labels"], batch["segment_ids"])
        return self.cross_entropy(batch, keep, targets), len(targets)

    def training_step(self, batch: ChatBatch, batch_idx: int) -> Tensor:
        loss, tokens = self.loss(batch)
        self._announce()
        self.train_means.add({"loss": loss}, tokens)
        return loss

    def _announce(self) -> None:
        """Say how the language model's batches are computed, when one is computed in a way that was not said yet."""
        for way in getattr(self.model.language, "ways", ()):
            if way not in self._announced:
                self._announced.add(way)
                if getattr(self.trainer, "is_global_zero", False):  # not where a step is only traced
                    tqdm.write(way)  # which leaves a progress bar whole

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        means, tokens = self.train_means.finish(self.trainer.world_size)
        # Undoes that DDP averages gradients over ranks and Lightning divides each loss by the number of micro-batches.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        rescale_gradients(self.model.parameters(), scale / tokens.clamp(min=1))
        self.log_dict({"train/loss": means["loss"], "train/tokens": tokens}, prog_bar=True)
        super().on_before_optimizer_step(optimizer)

    def validation_step(self, batch: ChatBatch, batch_idx: int) -> None:
        loss, tokens = self.loss(batch)
        self.val_means.add({"loss": loss}, tokens)

    def on_validation_epoch_end(self) -> None:
        means, _ = self.val_means.finish(self.trainer.world_size)
        self.log("val/loss", means["loss"], prog_bar=True)

    def rounded(self, precision: str) -> list[str]:
        fixed = [*self.frozen, *self.config.lora] if "bf16" in precision else []
        return list(dict.fromkeys([*super().rounded(precision), *fixed]))

    def on_fit_start(self) -> None:
        if "bf16" not in str(self.trainer.precision):
            return
        parts = parts_of(self.model)
        for name in self.frozen:
            parts[name].to(torch.bfloat16)
        for name in self.config.lora:
            for weight in parts[name].parameters():
                if weight.is_floating_point() and not weight.requires_grad:  # not of the adapter
                    weight.data = weight.data.to(torch.bfloat16)


class LanguagePretraining(NextTokenStage):
    """Next-token prediction on text alone (part: language).

    With `prompt.pictures: text` an image is replaced by its caption, so that the language model learns to answer
    questions about descriptions before it sees image features.
    """

    def cross_entropy(self, batch: ChatBatch, keep: Tensor, targets: Tensor) -> Tensor:
        language = self.model.language
        segments = batch["segment_ids"], batch["context_ids"], batch["position_ids"]
        return language.cross_entropy(language.embed(batch["input_ids"]), keep, targets, *segments, batch["packed"])
