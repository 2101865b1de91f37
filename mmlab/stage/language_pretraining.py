"""A small language model from scratch, for work on a CPU."""

from torch import Tensor

from mmlab.data.batch import ChatBatch
from mmlab.stage.vision_language import NextTokenStage


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
