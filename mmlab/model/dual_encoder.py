"""Two towers that meet in one space, for contrastive pretraining. Legend: B pairs, T tokens, E joint width."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from mmlab.model.checkpoint import build_pretrained, read_config
from mmlab.model.language import load_tokenizer
from mmlab.model.vision import VisionEncoder


class TextEncoder(nn.Module):
    """A transformers text tower, mean-pooled over its tokens.

    Args:
        source, init, architecture: as for the vision encoder.
        tokenizer: hub name or local folder; the source's own when None.
    """

    def __init__(
        self,
        source: str | None = None,
        init: str = "pretrained",
        architecture: dict[str, Any] | None = None,
        tokenizer: str | None = None,
    ):
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer or source)
        fields = {"vocab_size": len(self.tokenizer), **(architecture or {})} if init == "random" else {}
        config = read_config(source, fields, init, "text")
        self.config = getattr(config, "text_config", config)
        self.tower = build_pretrained(AutoModel, self.config, source, init, "text")

    @property
    def width(self) -> int:
        return self.config.hidden_size

    def unused(self) -> Iterator[nn.Parameter]:
        """The weights of BERT's pooler, which the mean does not read. It is kept: the tower's artifacts have it."""
        return (weight for name, weight in self.tower.named_parameters() if name.startswith("pooler."))

    def forward(self, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        hidden = self.tower(input_ids=input_ids_BT, attention_mask=mask_BT).last_hidden_state
        weights = mask_BT[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class Similarity(nn.Module):
    """Scaled and shifted cosine similarity; both start at 10 and -10, so that the many pairs that do not
    match do not dominate the first steps (SigLIP, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, picture_BE: Tensor, text_BE: Tensor) -> Tensor:
        """Logits `[B, B]` of picture i against text j."""
        return picture_BE @ text_BE.T * self.log_scale.exp() + self.bias


class DualEncoder(nn.Module):
    """Vision and text encoders with linear heads into one unit sphere (SigLIP, section 3).

    Args:
        vision: read at its `feature_layer` and mean-pooled over the patches, so that every patch learns.
        text: the text encoder.
        width: E, width of the joint space.
    """

    def __init__(self, vision: VisionEncoder, text: TextEncoder, width: int = 128):
        super().__init__()
        self.vision = vision
        self.text = text
        self.vision_head = nn.Sequential(nn.LayerNorm(vision.width), nn.Linear(vision.width, width))
        self.text_head = nn.Sequential(nn.LayerNorm(text.width), nn.Linear(text.width, width))
        self.similarity = Similarity()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit vectors `[B, E]` of the pictures and of the texts."""
        picture = self.vision_head(self.vision(pixel_values).mean(1))
        text = self.text_head(self.text(input_ids, attention_mask))
        return F.normalize(picture.float(), dim=-1), F.normalize(text.float(), dim=-1)
