"""Stage 2 of LLaVA."""

from mmlab.config.errors import ConfigError
from mmlab.stage.vision_language import VisionLanguageStage


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
