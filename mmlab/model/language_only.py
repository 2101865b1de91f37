"""A language model by itself."""

from torch import nn

from mmlab.model.language import LanguageModel


class LanguageOnly(nn.Module):
    """A model whose one part is `language`, so that a language model is trained and saved like any part.

    Args:
        language: the language model.
    """

    def __init__(self, language: LanguageModel):
        super().__init__()
        self.language = language
