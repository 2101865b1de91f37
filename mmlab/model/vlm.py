"""LLaVA's model: vision encoder, connector, language model; and MiniGPT-4's, with a Q-Former before the connector.

Legend: B rows, T tokens, N pictures, P tokens per picture, D language width, S supervised places, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmlab.model.language import LanguageModel
from mmlab.model.qformer import QFormer
from mmlab.model.vision import VisionEncoder


class VisionLanguageModel(nn.Module):
    """Picture features, projected by the connector, stand at the picture's place in the token sequence.

    Args:
        vision: the vision encoder.
        connector: built with (width of the picture's tokens, language width), so that no width is written twice.
        language: the language model.
        qformer: built with the vision width; its queries' outputs are then the picture's tokens (MiniGPT-4,
            section 3). None gives the connector the vision encoder's own.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Callable[[int, int], nn.Module],
        language: LanguageModel,
        qformer: Callable[[int], QFormer] | None = None,
    ):
        super().__init__()
        self.vision = vision
        self.qformer = None if qformer is None else qformer(vision.width)
        eye = self.qformer or vision
        self.connector = connector(eye.width, language.width)
        self.language = language
        self.tokens_per_image = eye.tokens_per_image

    def embed(self, input_ids_BT: Tensor, features_NPV: Tensor, image_positions_N2: Tensor) -> Tensor:
        """Embed tokens and put each picture's projected features at its place.

        Args:
            input_ids_BT: int64 `[B, T]`.
            features_NPV: output of `features`, `[N, P, V]`.
            image_positions_N2: int64 `[N, 2]`, row and first token of each picture.

        Returns:
            `[B, T, D]`.
        """
        embeds = self.language.embed(input_ids_BT)
        projected = self.connector(features_NPV).to(embeds.dtype)
        if len(image_positions_N2) == 0:
            # A rank without pictures still runs every part: under FSDP and DDP the others wait for it.
            return embeds + 0 * projected.sum()
        offsets = torch.arange(projected.shape[1], device=embeds.device)
        rows, columns = image_positions_N2[:, :1], image_positions_N2[:, 1:] + offsets
        return embeds.index_put((rows.expand_as(columns), columns), projected)

    def features(self, pixel_values: Tensor) -> Tensor:
        """uint8 `[N, 3, H, W]` → `[N, P, V]`; a blank stand-in when there is no picture (see `embed`)."""
        if len(pixel_values) == 0:
            size = self.vision.image_size
            pixel_values = pixel_values.new_zeros(1, 3, size, size)
        features = self.vision(pixel_values)
        return features if self.qformer is None else self.qformer(features)

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        image_positions: Tensor,
        keep: Tensor,
        segment_ids: Tensor,
        context_ids: Tensor,
        position_ids: Tensor,
        packed: bool = True,
    ) -> Tensor:
        """Logits `[S, V]` at the places where the bool `keep` `[B, T]` is true."""
        embeds = self.embed(input_ids, features, image_positions)
        return self.language(embeds, keep, segment_ids, context_ids, position_ids, packed)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, mask: Tensor, pixel_values: Tensor, image_positions: Tensor, **options
    ) -> Tensor:
        """Answer left-padded prompts; returns new token ids `[B, new]`.

        Args:
            input_ids: int64 `[B, T]`; mask: int64 `[B, T]`, 1 = token.
            pixel_values: uint8 `[N, 3, H, W]`; image_positions: int64 `[N, 2]`.
            options: transformers generation options, such as `max_new_tokens`.
        """
        embeds = self.embed(input_ids, self.features(pixel_values), image_positions)
        return self.language.generate(embeds, mask, **options)
