"""The vision-language stages: LLaVA's two and MiniGPT-4's. What they share, loss and logging, is in `next_token`."""

from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.data.batch import ChatBatch
from mmlab.data.sample import ImageSpec
from mmlab.stage.next_token import NextTokenStage


class VisionLanguageStage(NextTokenStage):
    """Next-token training of a vision-language model (parts: vision, connector, language; with a Q-Former, qformer)."""

    def image(self, aspect: str) -> ImageSpec | None:
        return ImageSpec(self.model.vision.image_size, aspect, self.model.tokens_per_image)

    def logits(self, batch: ChatBatch, keep: Tensor) -> Tensor:
        features = self.cache(batch["image_keys"], batch["pixel_values"], self.model.features)
        return self.model(
            input_ids=batch["input_ids"],
            features=features,
            image_positions=batch["image_positions"],
            keep=keep,
            segment_ids=batch["segment_ids"],
            context_ids=batch["context_ids"],
            position_ids=batch["position_ids"],
            packed=batch["packed"],
        )


class ProjectorAlignment(VisionLanguageStage):
    """Pre-training for feature alignment (Visual Instruction Tuning, section 4.2, stage 1).

    Vision encoder and language model stay frozen; the connector alone learns to place a picture's features
    among the word embeddings, so that the language model writes the picture's caption. The prompt is the
    picture alone (template `plain`); the loss is on the caption and its end.

    Raises:
        ConfigError: another part than the connector is to learn.
    """

    def refuse(self) -> None:
        if self.frozen != ["vision", "language"]:
            raise ConfigError(
                "stage=align trains the connector alone, so stage.trainable must be [connector]; "
                "use stage=finetune to train more."
            )


class EndToEndFinetuning(VisionLanguageStage):
    """Fine-tuning end to end (Visual Instruction Tuning, section 4.2, stage 2).

    In the paper the vision encoder stays frozen; connector and language model learn to answer. The prompt is a chat
    template; the loss is on the answers and their stops.

    Raises:
        ConfigError: the prompt has no questions (template `plain`).
    """

    def refuse(self) -> None:
        if self.prompt.template == "plain":
            raise ConfigError("stage=finetune learns to answer; stage.prompt.template=plain has no questions, use v1.")


class QFormerAlignment(VisionLanguageStage):
    """Alignment of a frozen Q-Former with a frozen language model (MiniGPT-4, sections 3.1 and 3.3).

    The linear layer alone learns. The first stage asks nothing: picture, caption in lower case, line break
    (template `plain`, captions `blip`). The second stage is the same on few curated descriptions, each the answer
    to one of four requests (template `minigpt4`, or `minigpt4_llama_2`); the loss is on the answer and its stop.

    Raises:
        ConfigError: the model has no Q-Former, or another part than the connector is to learn.
    """

    def refuse(self) -> None:
        if getattr(self.model, "qformer", None) is None:
            raise ConfigError("stage=qformer_align needs a model with a Q-Former; use model=minigpt4, or stage=align.")
        if self.frozen != ["vision", "qformer", "language"]:
            raise ConfigError(
                "stage=qformer_align trains the linear layer alone, so stage.trainable must be [connector]; "
                "use stage=finetune to train more."
            )
