"""A Q-Former with a text branch, for BLIP-2's first stage.

Legend: B pairs, P tokens per image, V vision width, Q queries, T text tokens, D the Q-Former's width, E joint width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model.config import ImageTextQFormerConfig
from mmlab.model.pretrained_tokenizer import find_tokenizer
from mmlab.model.qformer import QFormer, visible
from mmlab.model.vision import ImageEncoder, require_encoder

BERT_TOKENS = 30522
"""Vocabulary of bert-base-uncased, BLIP-2's tokenizer."""


class Words(nn.Module):
    """BERT's token embeddings and its output layer, which share a matrix.

    Args:
        vocabulary: number of tokens.
        config: of the Q-Former: `hidden_size`, `max_position_embeddings`, `initializer_range`, `layer_norm_eps`.
    """

    forward_methods = ("predict",)

    def __init__(self, vocabulary: int, config: Any):
        super().__init__()
        width = config.hidden_size
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.transform = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=config.layer_norm_eps)
        )
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=config.initializer_range)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """Embed token ids `[B, T]`: `[B, T, D]`; BERT's norm on embeddings is the Q-Former's first one."""
        places = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        return self.tokens(input_ids_BT) + self.positions(places)

    def predict(self, hidden_BTD: Tensor) -> Tensor:
        """Return logits `[…, vocabulary]` for outputs `[…, D]`."""
        return F.linear(self.transform(hidden_BTD), self.tokens.weight, self.bias)


class QueryContrast(nn.Module):
    """Similarity of images and texts: the highest among an image's queries.

    Args:
        width: D.
        joint: E.
    """

    def __init__(self, width: int, joint: int):
        super().__init__()
        self.picture = nn.Linear(width, joint)
        self.text = nn.Linear(width, joint)
        # As a logarithm it stays positive; BLIP-2 starts at 0.07 (LAVIS, blip2_qformer.py).
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def forward(self, queries_BQD: Tensor, text_BD: Tensor) -> Tensor:
        """Return float32 logits `[B, B]` of image i against text j."""
        images, texts = self.picture(queries_BQD), self.text(text_BD)
        # In bfloat16 neighboring cosines are equal, and so are the queries that the maximum chooses among.
        with torch.autocast(queries_BQD.device.type, enabled=False):
            images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
            return torch.einsum("iqe,je->ijq", images, texts).amax(-1) / self.log_temperature.exp()


class ImageTextQFormer(nn.Module):
    """A vision encoder and a Q-Former that reads images, texts, or both (BLIP-2, section 3.2 and figure 2).

    Args:
        config: settings; `width` is E.
        vision: the vision encoder.
        qformer: built with (vision width, `text=True`).

    Raises:
        ConfigError: a tokenizer without tokens that begin and end a text.
    """

    def __init__(self, config: ImageTextQFormerConfig, vision: ImageEncoder, qformer: Callable[..., QFormer]):
        super().__init__()
        require_encoder(vision)
        self.tokenizer: Any = find_tokenizer(config.tokenizer, "words")
        self.frame = (0, 0) if self.tokenizer is None else _frame(self.tokenizer)
        self.vision = vision
        self.qformer = qformer(vision.width, text=True)
        # One token more: [DEC], which begins a text to be generated.
        self.decode = BERT_TOKENS if self.tokenizer is None else len(self.tokenizer)
        self.words = Words(self.decode + 1, self.qformer.config)
        self.contrast = QueryContrast(self.qformer.width, config.width)
        self.match = nn.Linear(self.qformer.width, 2)

    def similarities(self, features_BPV: Tensor, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits `[B, B]` of image i against text j; queries and texts do not attend to each other."""
        queries, text = self._read("contrast", features_BPV, input_ids_BT, mask_BT)
        return self.contrast(queries, text[:, 0])

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return unit vectors `[B, Q, E]`, of which the one most similar to a text counts; see `QueryContrast`."""
        queries = self.qformer(self.vision(pixel_values))
        return F.normalize(self.contrast.picture(queries).float(), dim=-1)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return unit vectors `[B, E]`; the texts see no image."""
        nothing = self.contrast.picture.weight.new_zeros(len(input_ids), 1, self.vision.width)
        _, text = self._read("contrast", nothing, input_ids, attention_mask)
        return F.normalize(self.contrast.text(text[:, 0]).float(), dim=-1)

    def matches(self, features_BPV: Tensor, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits `[B, 2]` of whether image and text are a pair (index 1); all positions attend to all."""
        queries, _ = self._read("match", features_BPV, input_ids_BT, mask_BT)
        return self.match(queries).mean(1)

    def captions(self, features_BPV: Tensor, input_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return logits `[B, T, vocabulary]` of the next token, given the queries and the text up to each position."""
        started = torch.cat([torch.full_like(input_ids_BT[:, :1], self.decode), input_ids_BT[:, 1:]], 1)
        _, text = self._read("caption", features_BPV, started, mask_BT)
        return self.words.predict(text)

    def _read(self, task: str, features_BPV: Tensor, input_ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        seen = visible(task, mask_BT, self.qformer.tokens_per_image)
        return self.qformer.with_text(features_BPV, self.words(input_ids_BT), seen)


def _frame(tokenizer: Any) -> tuple[int, int]:
    """Return the ids that begin and end a text: BERT's, or those of a language model's tokenizer."""
    begin = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if begin is None or end is None:
        raise ConfigError(
            f"model.tokenizer {tokenizer.name_or_path} has no tokens that begin and end a text; use bert-base-uncased."
        )
    return begin, end
