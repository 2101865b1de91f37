"""Stage 1 of LLaVA."""

from mmlab.config.errors import ConfigError
from mmlab.stage.vision_language import VisionLanguageStage


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
