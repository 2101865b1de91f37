"""Both stages of MiniGPT-4."""

from mmlab.config.errors import ConfigError
from mmlab.stage.vision_language import VisionLanguageStage


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
