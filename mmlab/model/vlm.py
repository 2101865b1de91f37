"""LLaVA's model: vision encoder, connector, language model; and MiniGPT-4's, with a Q-Former before the connector.

Legend: K square images (a picture is one or several, its tiles), H/W pixels, P tokens per image, E width of image
features, M places of pictures, B rows, T tokens, D language width, S supervised positions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.model.language import LanguageModel
from mmlab.model.qformer import QFormer
from mmlab.model.vision import ImageEncoder, require_encoder


class VisionLanguageModel(nn.Module):
    """Image features, projected by the connector, take the places of pictures in the token sequence.

    Args:
        vision: the vision encoder.
        connector: built with (E, D), so that no width is written twice.
        language: the language model.
        qformer: built with (width of vision features, `text=False`); the image features are then its queries' outputs
            (MiniGPT-4, section 3). None: the vision features.
        newline: built with D; the feature that ends each row of a picture's tiles (LLaVA-NeXT). None: a picture is one
            square.

    Raises:
        ConfigError: `vision` lacks what an `ImageEncoder` has, or its features are no grid that could have newlines.
    """

    def __init__(
        self,
        vision: ImageEncoder,
        connector: Callable[[int, int], nn.Module],
        language: LanguageModel,
        qformer: Callable[..., QFormer] | None = None,
        newline: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        require_encoder(vision)
        self.vision = vision
        self.qformer = None if qformer is None else qformer(vision.width, text=False)
        encoder = self.qformer or vision
        self.connector = connector(encoder.width, language.width)
        self.language = language
        self.newline = None if newline is None else newline(language.width)
        self.tokens_per_image = encoder.tokens_per_image
        if newline is not None and (self.qformer or isqrt(self.tokens_per_image) ** 2 != self.tokens_per_image):
            what = "queries of a Q-Former" if self.qformer else f"{self.tokens_per_image} features of an image"
            raise ConfigError(f"model.newline ends the rows of a square grid of features, which {what} are not.")

    def features(self, pixels_K3HW: Tensor) -> Tensor:
        """Encode uint8 pixels as features `[K, P, E]`; without an image, a blank one (see `embed`)."""
        if len(pixels_K3HW) == 0:
            size = self.vision.image_size
            pixels_K3HW = pixels_K3HW.new_zeros(1, 3, size, size)
        features, name = self.vision(pixels_K3HW), type(self.vision).__name__
        tokens, width = self.vision.tokens_per_image, self.vision.width
        if not isinstance(features, Tensor):
            raise ConfigError(f"model.vision: {name} gives a {type(features).__name__}, not a tensor of features.")
        if features.shape != (len(pixels_K3HW), tokens, width):
            raise ConfigError(
                f"model.vision: {name} states tokens_per_image={tokens} and width={width}, but its features of "
                f"{len(pixels_K3HW)} images are {list(features.shape)}."
            )
        features = self._readable(features)
        return features if self.qformer is None else self.qformer(features)

    def _readable(self, features: Tensor) -> Tensor:
        """Features in the dtype of the next part, unless autocast casts them: an own encoder may compute in another."""
        weight = next((self.qformer or self.connector).parameters(), features)
        casts = torch.is_autocast_enabled(features.device.type) and features.dtype != torch.float64
        return features if casts else features.to(weight.dtype)

    def embed(self, input_ids_BT: Tensor, features_KPE: Tensor, positions_M2: Tensor, chosen_M: Tensor) -> Tensor:
        """Embed tokens, and put the projected features of pictures at their places.

        Args:
            input_ids_BT: int64.
            features_KPE: output of `features`.
            positions_M2: int64, row and column of each place.
            chosen_M: int64, which of the K * P features each place takes; K * P stands for the newline.

        Returns:
            `[B, T, D]`.
        """
        x_BTD = self.language.embed(input_ids_BT)
        image_ID = self.connector(features_KPE).to(x_BTD.dtype).flatten(0, 1)
        if self.newline is not None:
            image_ID = torch.cat([image_ID, self.newline().to(x_BTD.dtype)[None]])
        if len(positions_M2) == 0:
            # A rank without images runs every part all the same: with FSDP and DDP the others wait for it.
            return x_BTD + 0 * image_ID.sum()
        return x_BTD.index_put(positions_M2.unbind(1), image_ID[chosen_M])

    def forward(self, batch: Mapping[str, Any], features_KPE: Tensor, keep_BT: Tensor) -> Tensor:
        """Return logits `[S, V]` at the positions where the bool `keep_BT` is true, row by row.

        Args:
            batch: of a `ChatBatch`, the int64 `input_ids`, `segment_ids`, `context_ids` and `position_ids` `[B, T]`,
                `image_positions` `[M, 2]`, `image_features` `[M]`, and `packed`.
            features_KPE: output of `features`.
            keep_BT: the supervised positions.
        """
        x_BTD = self.embed(batch["input_ids"], features_KPE, batch["image_positions"], batch["image_features"])
        segments = (batch["segment_ids"], batch["context_ids"], batch["position_ids"])
        return self.language(x_BTD, keep_BT, *segments, batch["packed"])

    def cross_entropy(
        self, batch: Mapping[str, Any], features_KPE: Tensor, keep_BT: Tensor, targets_S: Tensor
    ) -> Tensor:
        """Return the cross-entropy summed over the S positions; arguments as for `forward`, and the tokens there."""
        x_BTD = self.embed(batch["input_ids"], features_KPE, batch["image_positions"], batch["image_features"])
        segments = (batch["segment_ids"], batch["context_ids"], batch["position_ids"])
        return self.language.cross_entropy(x_BTD, keep_BT, targets_S, *segments, batch["packed"])

    @torch.no_grad()
    def generate(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        pixels_K3HW: Tensor,
        positions_M2: Tensor,
        chosen_M: Tensor,
        **options: Any,
    ) -> Tensor:
        """Answer left-padded prompts; returns the new token ids `[B, new]`.

        Args:
            input_ids_BT: int64.
            mask_BT: int64, 1 = token.
            pixels_K3HW: uint8.
            positions_M2, chosen_M: as for `embed`.
            **options: transformers' generation options, such as `max_new_tokens`.
        """
        x_BTD = self.embed(input_ids_BT, self.features(pixels_K3HW), positions_M2, chosen_M)
        return self.language.generate(x_BTD, mask_BT, **options)
