"""Vision and text towers with a joint space, for contrastive pretraining. Legend: B pairs, T tokens, E joint width."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from mmlab.model.config import DualEncoderConfig, TextEncoderConfig
from mmlab.model.pretrained import build_model, load_pretrained, read_config
from mmlab.model.pretrained_tokenizer import find_tokenizer, fit_tokenizer
from mmlab.model.vision import ImageEncoder, require_encoder


class TextEncoder(nn.Module):
    """A transformers text tower, mean-pooled over its tokens.

    Args:
        config: settings; in `architecture`, `vocab_size` defaults to the tokenizer's.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.settings = config
        self.tokenizer: Any = find_tokenizer(config.tokenizer or config.source)
        size = {} if self.tokenizer is None else {"vocab_size": len(self.tokenizer)}
        whole = read_config(config, "text", **size)
        self.config = getattr(whole, "text_config", whole)
        self.vocabulary: int = self.config.vocab_size
        if self.tokenizer is not None:
            fit_tokenizer(self.tokenizer, self.vocabulary, "text")
        self.tower = build_model(AutoModel, self.config, config)

    def load_pretrained(self) -> None:
        """Fill the weights from the source of the settings."""
        load_pretrained(self.tower, self.settings, "text")

    @property
    def width(self) -> int:
        return self.config.hidden_size

    def unused(self) -> Iterator[nn.Parameter]:
        """Yield the weights of BERT's pooler, which the mean does not read; the tower's artifacts have them."""
        return (weight for name, weight in self.tower.named_parameters() if name.startswith("pooler."))

    def forward(self, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        hidden = self.tower(input_ids=input_ids_BT, attention_mask=mask_BT).last_hidden_state
        weights = mask_BT[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class Similarity(nn.Module):
    """Scaled and shifted cosine similarity. Scale and shift start at 10 and -10, so that the many pairs that do not
    match do not dominate the first steps (SigLIP, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image_BE: Tensor, text_BE: Tensor) -> Tensor:
        """Return logits `[B, B]` of image i against text j."""
        return image_BE @ text_BE.T * self.log_scale.exp() + self.bias


class DualEncoder(nn.Module):
    """Vision and text encoders with linear heads onto one unit sphere (SigLIP, section 3).

    Args:
        config: settings; `width` is E.
        vision: read at its `feature_layer` and mean-pooled over the patches, so that every patch is trained.
        text: the text encoder.
    """

    def __init__(self, config: DualEncoderConfig, vision: ImageEncoder, text: TextEncoder):
        super().__init__()
        require_encoder(vision)
        self.vision = vision
        self.text = text
        self.vision_head = nn.Sequential(nn.LayerNorm(vision.width), nn.Linear(vision.width, config.width))
        self.text_head = nn.Sequential(nn.LayerNorm(text.width), nn.Linear(text.width, config.width))
        self.similarity = Similarity()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors `[B, E]` of the images and of the texts."""
        return self.encode_images(pixel_values), self.encode_texts(input_ids, attention_mask)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return unit vectors `[B, E]`."""
        return F.normalize(self.vision_head(self.vision(pixel_values).mean(1)).float(), dim=-1)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit vectors `[B, E]`."""
        return F.normalize(self.text_head(self.text(input_ids, attention_mask)).float(), dim=-1)
