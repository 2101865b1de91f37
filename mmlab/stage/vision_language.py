"""The vision-language stages: LLaVA's two and MiniGPT-4's; their loss is in `next_token`."""

from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.data.anyres import image_spec
from mmlab.data.batch import ChatBatch
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.sample_types import ImageSpec
from mmlab.stage.next_token import NextTokenStage


class VisionLanguageStage(NextTokenStage):
    """Next-token training of a vision-language model (parts: vision, connector, language; with a Q-Former, qformer)."""

    def image(self, data: ImageTextDataConfig) -> ImageSpec | None:
        return image_spec(self.model, data)

    def cross_entropy(self, batch: ChatBatch, keep: Tensor, targets: Tensor) -> Tensor:
        features = self.cache(batch["image_keys"], batch["pixel_values"], self.model.features)
        return self.model.cross_entropy(batch, features, keep, targets)


class ProjectorAlignment(VisionLanguageStage):
    """Pre-training for feature alignment (Visual Instruction Tuning, section 4.2, stage 1).

    Vision encoder and language model are frozen; only the connector is trained, to map image features among the word
    embeddings such that the language model writes the image's caption. The prompt is the image alone (template
    `plain`); the loss is on the caption and its end. LLaVA-NeXT trains its newline in stage 2; it may learn here, too.

    Raises:
        ConfigError: other parts than the connector (and newline) are trained.
    """

    def refuse(self) -> None:
        if [name for name in self.frozen if name != "newline"] != ["vision", "language"]:
            newline = "" if self.model.newline is None else ", or [connector, newline] with data.aspect=anyres"
            raise ConfigError(
                f"stage=align trains only the connector, so stage.trainable must be [connector]{newline}; "
                "use stage=finetune to train more."
            )


class EndToEndFinetuning(VisionLanguageStage):
    """Fine-tuning end to end (Visual Instruction Tuning, section 4.2, stage 2).

    In the paper the vision encoder is frozen; connector and language model learn to answer. The prompt is a chat
    template; the loss is on the answers and their stops.

    Raises:
        ConfigError: the prompt has no questions (template `plain`).
    """

    def refuse(self) -> None:
        if self.config.prompt.template == "plain":
            raise ConfigError(
                "stage=finetune trains answers, but stage.prompt.template=plain has no questions; use v1."
            )


class QFormerAlignment(VisionLanguageStage):
    """Alignment of a frozen Q-Former with a frozen language model (MiniGPT-4, sections 3.1 and 3.3).

    Only the linear layer is trained. The first stage has no question: image, caption in lower case, line break
    (template `plain`, captions `blip`). The second stage is the same on a few curated descriptions, each the answer to
    one of four requests (template `minigpt4`, or `minigpt4_llama_2`); the loss is on the answer and its stop.

    Raises:
        ConfigError: the model has no Q-Former, or other parts than the connector are trained.
    """

    def refuse(self) -> None:
        if getattr(self.model, "qformer", None) is None:
            raise ConfigError("stage=qformer_align needs a model with a Q-Former; use model=minigpt4, or stage=align.")
        if self.frozen != ["vision", "qformer", "language"]:
            raise ConfigError(
                "stage=qformer_align trains only the linear layer, so stage.trainable must be [connector]; "
                "use stage=finetune to train more."
            )
