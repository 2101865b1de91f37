"""The vision encoder that the recipes name: `_target_: lite_encoder.Encoder`, with MMLAB_ALLOW_TARGETS=lite_encoder."""

import efficientnet_lite  # noqa: F401  # registers the tower with transformers

from mmlab.model.vision import VisionEncoder


class Encoder(VisionEncoder):
    """An `EfficientNetLite` from a folder in transformers' layout."""
