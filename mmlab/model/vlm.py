"""LLaVA's model: vision encoder, connector, language model; and MiniGPT-4's, with a Q-Former before the connector.

Legend: N images, H/W pixels, P tokens per image, E width of image features, B rows, T tokens, D language width,
S supervised positions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.language import LanguageModel
from mmlab.model.qformer import QFormer
from mmlab.model.vision import ImageEncoder, require_encoder


class VisionLanguageModel(nn.Module):
    """Image features, projected by the connector, take the image's positions in the token sequence.

    Args:
        vision: the vision encoder.
        connector: built with (E, D), so that no width is written twice.
        language: the language model.
        qformer: built with (width of vision features, `text=False`); the image features are then its queries' outputs
            (MiniGPT-4, section 3). None: the vision features.

    Raises:
        ConfigError: `vision` lacks what an `ImageEncoder` has.
    """

    def __init__(
        self,
        vision: ImageEncoder,
        connector: Callable[[int, int], nn.Module],
        language: LanguageModel,
        qformer: Callable[..., QFormer] | None = None,
    ):
        super().__init__()
        require_encoder(vision)
        self.vision = vision
        self.qformer = None if qformer is None else qformer(vision.width, text=False)
        encoder = self.qformer or vision
        self.connector = connector(encoder.width, language.width)
        self.language = language
        self.tokens_per_image = encoder.tokens_per_image

    def features(self, pixels_N3HW: Tensor) -> Tensor:
        """Encode uint8 pixels as features `[N, P, E]`; without an image, a blank one (see `embed`)."""
        if len(pixels_N3HW) == 0:
            size = self.vision.image_size
            pixels_N3HW = pixels_N3HW.new_zeros(1, 3, size, size)
        features, name = self.vision(pixels_N3HW), type(self.vision).__name__
        tokens, width = self.vision.tokens_per_image, self.vision.width
        if not isinstance(features, Tensor):
            raise ConfigError(f"model.vision: {name} gives a {type(features).__name__}, not a tensor of features.")
        if features.shape != (len(pixels_N3HW), tokens, width):
            raise ConfigError(
                f"model.vision: {name} states tokens_per_image={tokens} and width={width}, but its features of "
                f"{len(pixels_N3HW)} images are {list(features.shape)}."
            )
        features = self._readable(features)
        return features if self.qformer is None else self.qformer(features)

    def _readable(self, features: Tensor) -> Tensor:
        """Features in the dtype of the next part, unless autocast casts them: an own encoder may compute in another."""
        weight = next((self.qformer or self.connector).parameters(), features)
        casts = torch.is_autocast_enabled(features.device.type) and features.dtype != torch.float64
        return features if casts else features.to(weight.dtype)

    def embed(self, input_ids_BT: Tensor, features_NPE: Tensor, image_positions_N2: Tensor) -> Tensor:
        """Embed tokens, and put each image's projected features at its positions.

        Args:
            input_ids_BT: int64.
            features_NPE: output of `features`.
            image_positions_N2: int64, row and first token of each image.

        Returns:
            `[B, T, D]`.
        """
        x_BTD = self.language.embed(input_ids_BT)
        image_NPD = self.connector(features_NPE).to(x_BTD.dtype)
        if len(image_positions_N2) == 0:
            # A rank without images runs every part all the same: with FSDP and DDP the others wait for it.
            return x_BTD + 0 * image_NPD.sum()
        columns_NP = image_positions_N2[:, 1:] + torch.arange(image_NPD.shape[1], device=x_BTD.device)
        rows_NP = image_positions_N2[:, :1].expand_as(columns_NP)
        return x_BTD.index_put((rows_NP, columns_NP), image_NPD)

    def forward(self, batch: Mapping[str, Any], features_NPE: Tensor, keep_BT: Tensor) -> Tensor:
        """Return logits `[S, V]` at the positions where the bool `keep_BT` is true, row by row.

        Args:
            batch: of a `ChatBatch`, the int64 `input_ids`, `segment_ids`, `context_ids` and `position_ids` `[B, T]`,
                `image_positions` `[N, 2]`, and `packed`.
            features_NPE: output of `features`.
            keep_BT: the supervised positions.
        """
        x_BTD = self.embed(batch["input_ids"], features_NPE, batch["image_positions"])
        segments = (batch["segment_ids"], batch["context_ids"], batch["position_ids"])
        return self.language(x_BTD, keep_BT, *segments, batch["packed"])

    @torch.no_grad()
    def generate(
        self, input_ids_BT: Tensor, mask_BT: Tensor, pixels_N3HW: Tensor, image_positions_N2: Tensor, **options: Any
    ) -> Tensor:
        """Answer left-padded prompts; returns the new token ids `[B, new]`.

        Args:
            input_ids_BT: int64.
            mask_BT: int64, 1 = token.
            pixels_N3HW: uint8.
            image_positions_N2: int64, row and first token of each image.
            **options: transformers' generation options, such as `max_new_tokens`.
        """
        x_BTD = self.embed(input_ids_BT, self.features(pixels_N3HW), image_positions_N2)
        return self.language.generate(x_BTD, mask_BT, **options)
